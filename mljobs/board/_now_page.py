"""The page *now*: what runs, waits and needs attention."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from mljobs.board._access import Access
from mljobs.board._backend import DatabaseAway
from mljobs.board._charts import columns
from mljobs.board._html import Html
from mljobs.board._now import NowView, view
from mljobs.board._site import Links, Site, Viewer

_PARTS = {
    "figures": "now_figures.html",
    "attention": "now_attention.html",
    "running-jobs": "now_running.html",
    "workers": "now_workers.html",
    "minutes": "now_minutes.html",
    "queue": "now_queue.html",
    "next": "now_next.html",
    "failed-last": "now_failed.html",
}


def now_parts(site: Site, shown: NowView, url: Links) -> dict[str, str]:
    """Return the parts of the page, by the id of their element."""
    label = (
        f"Jobs finished in each minute of the last hour: {shown.completed} completed, {shown.failed} failed; "
        "the hour before is on the page Overview"
    )
    svg = columns(shown.columns, height=72, every=20, shape="hm", label=label, gap=0.45, side="right")
    values = {"view": shown, "url": url, "minutes_svg": svg}
    return {name: site.render(template, values) for name, template in _PARTS.items()}


async def render_now(site: Site, url: Links) -> dict[str, str]:
    """Return the parts of the page as the database has it now."""
    return now_parts(site, await site.hub.now(), url)


async def now(request: Request) -> Response:
    """Show what runs now."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    watched = site.hub.view(("now", viewer.url.root), partial(render_now, site, viewer.url))
    try:
        shown = await site.hub.now()
    except DatabaseAway:
        kept = site.hub.last
        if kept is None:
            raise
        return _now_away(request, site, viewer, view(kept))
    parts = {name: Html(html) for name, html in now_parts(site, shown, viewer.url).items()}
    read_only = await site.why_read_only(viewer)
    return site.page(
        request,
        viewer,
        "now.html",
        here="now",
        heading=f"{shown.running} running",
        stream=viewer.url("events", view="now"),
        last=f"{site.hub.boot}.{watched.number}",
        read_only=read_only,
        view=shown,
        parts=parts,
        may_rescue=read_only is None and viewer.access.may(Access.RESCUE),
    )


def _now_away(request: Request, site: Site, viewer: Viewer, shown: NowView) -> Response:
    parts = {name: Html(html) for name, html in now_parts(site, shown, viewer.url).items()}
    return site.page(
        request,
        viewer,
        "now_away.html",
        here="now",
        heading="The database does not answer",
        status=503,
        stream=viewer.url("events", view="now"),
        last="",
        view=shown,
        parts=parts,
        may_rescue=False,
        since=site.hub.away_since,
        message=site.hub.away_why,
    )
