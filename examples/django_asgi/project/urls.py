"""The routes of Django's side."""

from __future__ import annotations

from django.urls import path
from uploads import views

urlpatterns = [
    path("uploads", views.upload),
    path("jobs/<uuid:job_id>", views.read),
    path("jobs/<uuid:job_id>/cancel", views.cancel),
]
