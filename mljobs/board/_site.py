"""What every page of one board shares: the store, who may do what, templates, and where its links lead."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.types import Scope

from mljobs._values import utc_now
from mljobs.board._access import Access, Authorize, Tokens, access_of
from mljobs.board._backend import Backend
from mljobs.board._charts import cell
from mljobs.board._finished import FinishedKept
from mljobs.board._format import ago, clock, cut, duration, iso, literal, plural, short, short_id, size, when
from mljobs.board._html import shown, verbatim
from mljobs.board._hub import Hub

THEME = "mljobs-theme"
"""The one cookie: ``light`` or ``dark``."""
ROOT = "mljobs.board.root"
"""Where in the scope the path stands that the board is mounted at."""


def quoted(text: str) -> str:
    """Return text as a value of a filter."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@cache
def templates() -> Environment:
    """Return the templates, with everything escaped, and each character that has no shape written out."""
    made = Environment(
        loader=PackageLoader("mljobs.board"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=shown,
    )
    made.filters |= {
        "verbatim": verbatim,
        "cut": cut,
        "short_id": short_id,
        "size": size,
        "quoted": quoted,
        "literal": literal,
    }
    made.filters |= {"iso": iso, "clock": clock}
    made.globals |= {"when": when, "ago": ago, "duration": duration, "short": short, "cell": cell, "plural": plural}
    return made


@cache
def version() -> str:
    """Return what the addresses of the static files end with, so that a new release is fetched anew."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("mljobs.board").joinpath("static").iterdir(), key=lambda one: one.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def path_in(scope: Scope) -> str:
    """Return the path that was asked for, from the root of the board on; some servers leave the mount out of the path."""
    path: str = scope.get("path", "/")
    return path.removeprefix(scope.get(ROOT, scope.get("root_path", "")).rstrip("/"))


class Links:
    """Addresses on this board, wherever it is mounted: ``url("jobs", q="status:failed")``.

    Args:
        root: The path that it is mounted at, behind whichever proxy; no slash at its end.
    """

    def __init__(self, root: str) -> None:
        self.root = re.sub("//+", "/", root).rstrip("/")

    @classmethod
    def of(cls, scope: Scope) -> Links:
        """Return the addresses of the board that a request has reached, whichever of its own mounts it is in."""
        return cls(scope.get(ROOT, scope.get("root_path", "")))

    def __call__(self, path: str, **query: Any) -> str:
        pairs = [(name, value) for name, value in query.items() if value not in (None, "", [])]
        tail = f"?{urlencode(pairs, doseq=True)}" if pairs else ""
        return f"{quote(self.root)}/{quote(path)}{tail}"

    def here(self, scope: Scope) -> str:
        """Return the address that was asked for."""
        path = path_in(scope)
        query = scope.get("query_string", b"").decode("latin-1")
        return self(path.lstrip("/")) + (f"?{query}" if query else "")

    def leads_here(self, address: str) -> bool:
        """Whether an address that a form brings is one of this board's."""
        begins = address.startswith(f"{quote(self.root)}/") and not address.startswith("//")
        return begins and "\\" not in address and address.isprintable() and ".." not in address


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks, and from where."""

    access: Access
    read_only: str | None
    url: Links


class Site:
    """One board.

    Args:
        backend: The store.
        authorize: What the host says of a request; None lets everybody read.
        name: Beside the logo: which installation this is.
        secret: Of the tokens in forms.
    """

    def __init__(self, backend: Backend, authorize: Authorize | None, name: str | None, secret: str | None) -> None:
        self.backend = backend
        self.hub = Hub(backend)
        self.authorize = authorize
        self.name = name
        self.tokens = Tokens(secret)
        self.version = version()
        self.finished = FinishedKept()
        self.figures: dict[str, Any] = {}
        self.counting: asyncio.Task[None] | None = None
        self._read_only: tuple[datetime, str | None] | None = None

    @property
    def title(self) -> str:
        """What each page's title ends with."""
        return f"mljobs {self.name}" if self.name else "mljobs"

    @property
    def place(self) -> str:
        """Which database and table."""
        return self.backend.place

    @property
    def table(self) -> str:
        """The name of the table."""
        return str(self.backend.model.__table__.name)  # type: ignore[attr-defined]

    async def viewer(self, request: Request) -> Viewer:
        """Return who asks.

        Raises:
            HTTPException: Somebody who may see nothing (403).
        """
        access = await access_of(request, self.authorize)
        return Viewer(access, None, Links.of(request.scope))

    def page(
        self,
        request: Request,
        viewer: Viewer,
        template: str,
        *,
        here: str = "",
        heading: str,
        status: int = 200,
        stream: str = "",
        last: str = "",
        read_only: str | None = None,
        **values: Any,
    ) -> HTMLResponse:
        """Return a page.

        Args:
            request: What was asked.
            viewer: Who asks.
            template: Its name.
            here: Which of the pages of the bar it is.
            heading: What it is about, for its title.
            status: Of the answer.
            stream: Where what changes is told; empty where nothing does.
            last: What this page is up to date with.
            read_only: Why nothing can be changed; None where something may be.
            **values: For the template.
        """
        theme = request.cookies.get(THEME)
        shared = {
            "site": self,
            "url": viewer.url,
            "root": viewer.url.root,
            "theme": theme if theme in ("light", "dark") else "",
            "token": self.tokens.new(),
            "now": utc_now(),
            "here": here,
            "heading": heading,
            "here_url": viewer.url.here(request.scope),
            "stream": stream,
            "last": last,
            "read_only": read_only,
        }
        html = templates().get_template(template).render(shared | values)
        return HTMLResponse(html, status, headers={"Cache-Control": "no-store"})

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Return a part of a page."""
        return templates().get_template(template).render(values)

    async def why_read_only(self, viewer: Viewer) -> str | None:
        """Return why this person can change nothing, in words; None where something may be.

        What the database says is asked once a minute.
        """
        from mljobs import jobs  # noqa: PLC0415 - beside its one use

        if viewer.access == Access.READ:
            return "You may look, and change nothing." if self.authorize else "This board is read only."
        now = utc_now()
        if self._read_only is None or (now - self._read_only[0]).total_seconds() > 60:
            model = self.backend.model
            reason = await self.backend.read(lambda bind: jobs.why_read_only(bind, model=model))
            self._read_only = now, f"Read only: {reason}." if reason else None
        return self._read_only[1]
