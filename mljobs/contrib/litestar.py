"""Our errors as HTTP answers in a Litestar application."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response
from litestar.config.app import AppConfig
from litestar.plugins import InitPluginProtocol

from mljobs.contrib.problems import MEDIA_TYPE, body_of, status_of
from mljobs.errors import MlJobsError


def answer(request: Request[Any, Any, Any], error: MlJobsError) -> Response[bytes]:
    """Answer one of our errors with its status and its problem details; an exception handler.

    Args:
        request: What was asked.
        error: One of ours.
    """
    body = body_of(error, instance=request.url.path)
    return Response(body, status_code=status_of(error), media_type=MEDIA_TYPE)


class MlJobsPlugin(InitPluginProtocol):
    """Answer each of our errors with its status and its problem details: ``Litestar(plugins=[MlJobsPlugin()])``.

    Commit in the handler: the session plugin's ``autocommit`` hides a commit that fails, and answers as if it stood.
    """

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add the handler, unless the application has one of its own for ``MlJobsError``."""
        app_config.exception_handlers = {MlJobsError: answer, **app_config.exception_handlers}
        return app_config
