"""Django, and Starlette's routes next to it: one process, one port, two applications."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from django.core.asgi import get_asgi_application
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Mount, Route

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
django = get_asgi_application()  # before anything that needs the settings

from mljobs.contrib.django import async_store  # noqa: E402
from mljobs.contrib.pydantic import MlJobRead  # noqa: E402
from mljobs.contrib.starlette import install  # noqa: E402

POLL = float(os.environ.get("POLL", "0.5"))


async def events(request: Request) -> StreamingResponse:
    """Server-sent events: the job at each change, until it has finished."""
    store = request.app.state.store
    job = await store.get(request.path_params["job_id"])  # JobNotFound here is still a 404

    async def stream() -> AsyncIterator[str]:
        current, shown = job, None
        while True:
            if (current.status, current.progress) != shown:
                shown = current.status, current.progress
                yield f"data: {MlJobRead.model_validate(current).model_dump_json()}\n\n"
            if current.is_terminal:
                return
            await asyncio.sleep(POLL)
            current = await store.get(job.id)

    return StreamingResponse(stream(), media_type="text/event-stream")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open a store with connections of its own, on Django's database."""
    async with async_store() as app.state.store:
        yield


application = Starlette(
    routes=[Route("/stream/{job_id:uuid}", events), Mount("/", django)],
    lifespan=lifespan,
)
install(application)
