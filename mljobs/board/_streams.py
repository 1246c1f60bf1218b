"""What changes, as server-sent events, and by polling where something on the way eats the stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

from anyio import move_on_after
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mljobs import jobs
from mljobs._values import to_job_id, utc_now
from mljobs.board._format import iso
from mljobs.board._hub import MOST_STREAMS, View
from mljobs.board._job_page import render_job
from mljobs.board._now_page import render_now
from mljobs.board._overview_page import PERIODS, render_overview
from mljobs.board._query import LOOK_SECONDS, MOST_TEXT
from mljobs.board._site import Links, Site
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Filter

LIFE = 300.0
"""Seconds after which a stream ends and is opened anew, so that ``authorize`` is asked again and a dead reader is let go."""
_LIST_EVERY = 5.0
_LISTED = 100
_LISTS_MOST = 50


class Stream(StreamingResponse):
    """An answer that ends after a while, whether or not it is read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with move_on_after(LIFE):
            await super().__call__(scope, receive, send)


async def events(request: Request) -> Response:
    """Send what changes on one page, as long as it is open."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    if site.hub.streams >= MOST_STREAMS:
        return Response("Too many streams are open; poll instead.", 503, headers={"Retry-After": "30"})
    view = _view_of(request, site, viewer.url)
    if request.method == "HEAD":  # which is to have no body, and would be sent one for minutes
        return Response(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    last = request.headers.get("last-event-id") or request.query_params.get("last", "")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Stream(_events(site, view, last), media_type="text/event-stream", headers=headers)


async def _events(site: Site, view: View, last: str) -> AsyncIterator[str]:
    yield f"retry: 2000\nevent: hello\ndata: {site.hub.boot}\n\n"
    async for number, fragments in site.hub.follow(view, last):
        yield f"id: {number}\nevent: {'patch' if fragments else 'beat'}\ndata: {json.dumps(_message(fragments))}\n\n"


def _message(fragments: dict[str, str]) -> dict[str, Any]:
    return {"at": iso(utc_now()), "html": fragments}


async def poll(request: Request) -> Response:
    """Return what has changed since, at once."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    view = _view_of(request, site, viewer.url)
    await site.hub.refresh(view)
    number = site.hub.number_of(request.query_params.get("last", ""))
    body = {"id": f"{site.hub.boot}.{view.number}", **_message(view.since(number))}
    return JSONResponse(body, headers={"Cache-Control": "no-store"})


def _view_of(request: Request, site: Site, url: Links) -> View:
    query = request.query_params
    name = query.get("view")
    if name == "now":
        return site.hub.view(("now", url.root), partial(render_now, site, url))
    if name == "job":
        try:
            job_id: UUID = to_job_id(query.get("id", ""))
        except InvalidValueError as error:
            raise HTTPException(404) from error
        return site.hub.view(("job", url.root, job_id), partial(render_job, site, url, job_id))
    if name == "overview" and query.get("span") in PERIODS:
        span = query["span"]
        return site.hub.view(("overview", span), partial(render_overview, site, PERIODS[span]))
    if name == "jobs":
        text = query.get("q", "")[:MOST_TEXT]
        found, problems = Filter.read(text, site.backend.model)
        lists = sum(isinstance(key, tuple) and key[0] == "jobs" for key in site.hub.views)
        if problems or (lists >= _LISTS_MOST and ("jobs", text) not in site.hub.views):
            raise HTTPException(404)
        return site.hub.view(("jobs", text), _listing(site, found))
    raise HTTPException(404)


def _listing(site: Site, asked: Filter) -> Callable[[], Awaitable[dict[str, str]]]:
    """Return what tells which jobs a filter finds first: one question for all who look at the same list."""
    kept: list[Any] = [0.0, {}]

    async def render() -> dict[str, str]:
        if time.monotonic() - kept[0] >= _LIST_EVERY:
            model = site.backend.model

            def read(bind: Bind) -> list[str]:
                page = jobs.summaries(bind, asked, limit=_LISTED, seconds=LOOK_SECONDS, text=0, model=model)
                return [str(job.id) for job in page.jobs]

            kept[:] = [time.monotonic(), {"~ids": ",".join(await site.backend.read(read))}]
        found: dict[str, str] = kept[1]
        return found

    return render
