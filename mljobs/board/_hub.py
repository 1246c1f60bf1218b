"""One watcher for all viewers: reads once, renders once, and tells each open stream what has changed since it last heard.

A stream holds no queue. Each view has its fragments, each with the number of the look at which it last changed; a stream
that is slow, or was away, is told those that are newer than the last number it has. So nothing can pile up, nothing is lost,
and a stream that comes from another process, or from before a restart, is told all.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.board import _now
from mljobs.board._backend import Backend, DatabaseAway, TooSlow
from mljobs.board._finished import FinishedKept
from mljobs.board._now import NowView, Snapshot, Surroundings
from mljobs.jobs import Bind, JobSummary

logger = logging.getLogger(__name__)

AWAY = "~away"
"""What a view says beside its fragments: why the database does not answer; empty while it does."""
MOST_STREAMS = 500
"""How many streams one process serves; a page beyond them polls."""
LOOK_EVERY = 1.0
"""Seconds between two looks, while anybody watches."""
_AROUND_EVERY = 5.0
_COST_APART = 20.0
"""How many times as long as reading the surroundings took they are left alone: a busy queue pays a twentieth at most."""
_WAITS_EVERY = 300.0
_USUAL_EVERY = 120.0
_BEAT_EVERY = 15.0
_LAST_VIEW_KEPT = 30.0
_DIGITS = 16


@dataclass
class View:
    """What is shown to those who watch one page: fragments by id, and when each changed."""

    render: Callable[[], Any]
    fragments: dict[str, tuple[int, str]] = field(default_factory=dict)
    number: int = 0
    watchers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    left: float = 0.0

    def put(self, fragments: dict[str, str]) -> None:
        """Take new fragments; those that are the same as before keep their number."""
        fresh = {name: html for name, html in fragments.items() if self.fragments.get(name, (0, None))[1] != html}
        if fresh:
            self.number += 1
            self.fragments |= {name: (self.number, html) for name, html in fresh.items()}
            changed, self.changed = self.changed, asyncio.Event()
            changed.set()

    def since(self, number: int) -> dict[str, str]:
        """Return the fragments that changed after ``number``."""
        return {name: html for name, (at, html) in self.fragments.items() if at > number}


class Hub:
    """Looks at the database for everybody.

    Args:
        backend: Where to read.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.boot = secrets.token_hex(4)
        self.views: dict[Hashable, View] = {}
        self.watched_jobs: dict[UUID, JobSummary] = {}
        self.away_since: Any = None
        self.away_why = ""
        self.looks = 0
        self.streams = 0
        self._snapshot: Snapshot | None = None
        self._cost = 0.0
        self._around: tuple[float, Surroundings] | None = None
        self._waits: tuple[float, dict[str, float]] | None = None
        self.minutes = FinishedKept(timedelta(minutes=1), fresh=timedelta(minutes=2), seconds=0.0)
        self._usual: dict[tuple[str, str], tuple[float, float | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._lock: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    @property
    def last(self) -> Snapshot | None:
        """What stood in the database at the last look that it answered."""
        return self._snapshot

    # ---------------------------------------------------------------------------------------------------- one look

    async def snapshot(self, *, oldest: float = LOOK_EVERY) -> Snapshot:
        """Return what stands in the database, at most so many seconds old: several viewers share one look.

        Raises:
            DatabaseAway, TooSlow: See ``Backend.read``.
        """
        self._on_this_loop()
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            kept = self._snapshot
            if kept is None or (utc_now() - kept.at).total_seconds() >= oldest:
                self._snapshot = kept = await self._look(kept)
            return kept

    async def _look(self, before: Snapshot | None) -> Snapshot:
        try:
            found = await self.backend.read(partial(self._read, before))
        except (DatabaseAway, TooSlow) as error:
            if self.away_since is None:
                self.away_since = utc_now()
            self.away_why = str(error)
            raise
        self.away_since = None
        self.looks += 1
        return found

    def _read(self, before: Snapshot | None, bind: Bind) -> Snapshot:
        model, now = self.backend.model, time.monotonic()
        running = _now.read_running(bind, model)
        moved = before is None or {job.id for job in before.running} != {job.id for job in running}
        kept = self._around
        if kept is None or now - kept[0] >= max(LOOK_EVERY if moved else _AROUND_EVERY, self._cost * _COST_APART):
            waits = self._waits[1] if self._waits is not None and now - self._waits[0] < _WAITS_EVERY else None
            around = _now.read_surroundings(bind, model, self.minutes, waits)
            if waits is None:
                self._waits = now, around.waits_p95
            self._cost = time.monotonic() - now
            self._around = kept = now, around
        pairs = {(str(job.kind), job.target_name) for job in running}
        self._usual = {pair: self._usual[pair] for pair in pairs if pair in self._usual}
        unknown = [pair for pair in pairs if pair not in self._usual or now - self._usual[pair][0] > _USUAL_EVERY]
        if unknown:
            found = jobs.usual_durations(bind, unknown, model=model)
            self._usual |= {pair: (now, found.get(pair)) for pair in unknown}
        usual = {pair: seconds for pair, (_, seconds) in self._usual.items() if seconds is not None}
        watched = list(self.watched_jobs)
        if watched:
            for job in jobs.summaries_of(bind, watched, text=0, model=model):
                self.watched_jobs[job.id] = job
        return Snapshot(utc_now(), running, usual, kept[1])

    def usual_of(self, job: JobSummary) -> float | None:
        """Return how long such a job usually takes, where that is known already."""
        return self._usual.get((str(job.kind), job.target_name), (0, None))[1]

    async def now(self) -> NowView:
        """Return the page *now* as it is."""
        return _now.view(await self.snapshot())

    # ------------------------------------------------------------------------------------------------------ streams

    def view(self, key: Hashable, render: Callable[[], Any]) -> View:
        """Return the view that is known by this key; ``render`` returns its fragments, awaited."""
        self._on_this_loop()
        if key not in self.views:
            self._forget_views()
            self.views[key] = View(render)
        self.views[key].left = time.monotonic()
        return self.views[key]

    def _forget_views(self) -> None:
        """Forget the views that nobody has watched for a while, or asked for by polling."""
        now = time.monotonic()
        for key, view in list(self.views.items()):
            if not view.watchers and now - view.left > _LAST_VIEW_KEPT:
                del self.views[key]

    async def refresh(self, view: View) -> None:
        """Render a view now, for whoever comes first."""
        view.put({AWAY: "", **await view.render()})

    def number_of(self, last: str) -> int:
        """Return the number in the id of an event; 0 where it is none of this process."""
        boot, _, digits = last.partition(".")
        return int(digits) if boot == self.boot and digits.isdecimal() and len(digits) < _DIGITS else 0

    async def follow(self, view: View, last: str) -> AsyncIterator[tuple[str, dict[str, str]]]:
        """Yield an id and the fragments that changed, each time some did; nothing but an id as a beat.

        Args:
            view: What is watched.
            last: The last id that was received; empty at first.
        """
        number = self.number_of(last)
        view.watchers += 1
        self.streams += 1
        self._start()
        try:
            while not self.ending:
                changed = view.changed
                fresh = view.since(number)
                if fresh:
                    number = view.number
                    yield f"{self.boot}.{number}", fresh
                    continue
                try:
                    await asyncio.wait_for(self._something(changed), _BEAT_EVERY)
                except TimeoutError:
                    yield f"{self.boot}.{number}", {}
        finally:
            view.watchers -= 1
            view.left = time.monotonic()
            self.streams -= 1

    async def _something(self, changed: asyncio.Event) -> None:
        while not changed.is_set() and not self.ending:
            try:
                await asyncio.wait_for(changed.wait(), LOOK_EVERY)
            except TimeoutError:
                continue

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch(), name="mljobs board")

    async def _watch(self) -> None:
        while not self.ending:
            self._forget_views()
            watched = [view for view in self.views.values() if view.watchers]
            if not watched and not self.streams:
                return
            try:
                await self.snapshot(oldest=LOOK_EVERY * 0.5)
            except (DatabaseAway, TooSlow):
                pass
            except Exception:
                logger.exception("the board's look at the database failed; it looks again")
            for view in watched:
                try:
                    view.put({AWAY: "", **await view.render()})
                except (DatabaseAway, TooSlow) as error:
                    view.put({AWAY: str(error)})
                except Exception:
                    logger.exception("a view of the board could not be rendered")
            await asyncio.sleep(LOOK_EVERY)

    def _on_this_loop(self) -> None:
        """Forget what belongs to another event loop, as when a server was started anew in this process."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._task, self._lock = loop, None, None
            self.views, self.streams, self._stopped = {}, 0, False

    def stop(self) -> None:
        """End all streams."""
        self._stopped = True

    @property
    def ending(self) -> bool:
        """Whether the server wants to end: uvicorn waits for open answers before it tells anybody."""
        server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        return self._stopped or bool(getattr(server, "should_exit", False))
