"""How many jobs finished in each hour of the last weeks: counted once for all viewers, some hours at a time.

What finished in an hour that is over no longer changes. A page counts some thousand jobs, the newest hours first, and
shows what is known; the rest is counted beside, in short transactions.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime, timedelta

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.jobs import Bind, Finished, Model
from mljobs.states import MlJobStatus

PAGE_JOBS = 15_000
"""About how many jobs a page counts at most."""
HOUR = timedelta(hours=1)
_FRESH = timedelta(minutes=10)  # a transaction may commit an end that lies so far back
_RECENT_SECONDS = 10.0
_KEPT_SECONDS = 3600.0
_FIRST_HOURS, _MOST_HOURS = 2, 384
_FEW, _MANY = 1_000, 5_000


class FinishedKept:
    """What finished, by hours."""

    def __init__(self) -> None:
        self._hours: dict[datetime, Counter[MlJobStatus]] = {}
        self._recent: tuple[float, datetime, dict[datetime, Counter[MlJobStatus]]] | None = None
        self._made = time.monotonic()
        self._at_once = _FIRST_HOURS

    def count(self, bind: Bind, since: datetime, model: Model, most: int = PAGE_JOBS) -> None:
        """Count what is not known, the newest hours first; begin no further statement after so many jobs.

        Args:
            bind: Where to read.
            since: The first hour.
            model: The mapped job class.
            most: About how many jobs.
        """
        begin, number = time.monotonic(), 0
        if begin - self._made > _KEPT_SECONDS:  # records may have been imported, or pruned
            self._hours, self._made = {}, begin
        over = self._over()
        if self._recent is None or begin - self._recent[0] > _RECENT_SECONDS or self._recent[1] != over:
            self._recent = begin, over, _by_hour(jobs.finished_per(bind, HOUR, since=over, model=model))
        while number < most and (end := self._unknown(since)) is not None:
            number += self._count_before(bind, end, max(since, end - self._at_once * HOUR), model)

    def _count_before(self, bind: Bind, end: datetime, start: datetime, model: Model) -> int:
        found = _by_hour(jobs.finished_per(bind, HOUR, since=start, until=end, model=model))
        while end > start:
            end -= HOUR
            self._hours[end] = found.get(end, Counter())
        number = sum(counted.total() for counted in found.values())
        if number < _FEW:
            self._at_once = min(self._at_once * 2, _MOST_HOURS)
        elif number > _MANY:
            self._at_once = max(self._at_once // 2, 1)
        return number

    @staticmethod
    def _over() -> datetime:
        """Return the end of the hours that are over for good."""
        moment = utc_now() - _FRESH
        return moment.replace(minute=0, second=0, microsecond=0)

    def _unknown(self, since: datetime) -> datetime | None:
        """Return the end of the newest hour that is not counted; None where all are."""
        hour = self._over() - HOUR
        while hour >= since:
            if hour not in self._hours:
                return hour + HOUR
            hour -= HOUR
        return None

    def counted_from(self, since: datetime) -> datetime:
        """Return from when on all is counted."""
        return self._unknown(since) or since

    def per(self, width: timedelta, since: datetime) -> list[Finished]:
        """Return what is known, by spans of whole hours.

        Args:
            width: Of a span.
            since: When the first begins.
        """
        spans: dict[datetime, Counter[MlJobStatus]] = {}
        recent = self._recent[2] if self._recent is not None else {}
        for hour, counted in sorted((self._hours | recent).items()):
            if hour >= since:
                start = since + (hour - since) // width * width
                spans.setdefault(start, Counter()).update(counted)
        return [Finished(start, status, number) for start, found in spans.items() for status, number in found.items()]


def _by_hour(found: list[Finished]) -> dict[datetime, Counter[MlJobStatus]]:
    hours: dict[datetime, Counter[MlJobStatus]] = {}
    for one in found:
        hours.setdefault(one.start, Counter())[one.status] += one.jobs
    return hours
