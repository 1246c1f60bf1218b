"""The settings, as far as the example needs them."""

from __future__ import annotations

import os

from sqlalchemy import make_url

_url = make_url(os.environ.get("DATABASE_URL", "sqlite:///app.db"))
_sqlite = _url.get_backend_name() == "sqlite"

SECRET_KEY = os.environ.get("SECRET_KEY", "only for this example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "testserver"]
INSTALLED_APPS = ["uploads"]
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "mljobs.contrib.django.ProblemMiddleware",
]
ROOT_URLCONF = "project.urls"
ASGI_APPLICATION = "project.asgi.application"
DATABASES = {
    "default": {
        "ENGINE": f"django.db.backends.{'sqlite3' if _sqlite else 'postgresql'}",
        "NAME": _url.database,
        "USER": _url.username or "",
        "PASSWORD": _url.password or "",
        "HOST": _url.host or "",
        "PORT": _url.port or "",
        # A transaction of SQLite that reads first and writes later would be refused, and not wait, where another
        # has written between.
        "OPTIONS": {"transaction_mode": "IMMEDIATE"} if _sqlite else {},
    }
}
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
