"""The same as JSON under ``api/``: which address is answered by what."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mljobs.board import _api_figures, _api_files, _api_jobs, _streams
from mljobs.board._api_requests import answer, viewer_of
from mljobs.board._openapi import document


async def openapi(request: Request) -> Response:
    """Return what there is, as OpenAPI 3.1."""
    site, viewer = await viewer_of(request)
    return answer(document(viewer.url("api").rstrip("/"), list(site.backend.model.__kinds__)))


ROUTES: list[BaseRoute] = [
    Route("/openapi.json", openapi, methods=["GET"]),
    Route("/jobs", _api_jobs.listed, methods=["GET"]),
    Route("/jobs", _api_jobs.submitted, methods=["POST"]),
    Route("/jobs.ndjson", _api_files.ndjson, methods=["GET"]),
    Route("/jobs.csv", _api_files.as_csv, methods=["GET"]),
    Route("/jobs/{id}", _api_jobs.found, methods=["GET"]),
    Route("/jobs/{id}/chain", _api_jobs.chain, methods=["GET"]),
    Route("/jobs/{id}/cancel", _api_jobs.cancelled, methods=["POST"]),
    Route("/jobs/{id}/retry", _api_jobs.retried, methods=["POST"]),
    Route("/stats", _api_figures.stats, methods=["GET"]),
    Route("/workers", _api_figures.workers, methods=["GET"]),
    Route("/compare", _api_figures.compare, methods=["GET"]),
    Route("/compare.csv", _api_files.compare_csv, methods=["GET"]),
    Route("/target", _api_figures.target, methods=["GET"]),
    Route("/events", _streams.events, methods=["GET"]),
]
"""What is under ``api/``."""
