"""How many jobs finished in each hour of the last weeks, each minute of the last hour: counted once for all viewers.

What finished in a time that is over no longer changes. A page counts some thousand jobs, the newest first, and shows what
is known; the rest is counted beside, in short transactions.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime, timedelta

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.jobs import Bind, Finished, Model
from mljobs.states import MlJobStatus

PAGE_JOBS = 5_000
"""About how many jobs a page counts at most."""
HOUR, _MINUTE = timedelta(hours=1), timedelta(minutes=1)
_KEPT_SECONDS = 3600.0
_FIRST, _MOST = 2, 384
_FEW, _MANY = 1_000, 5_000


class FinishedKept:
    """What finished, by spans of time of one width.

    Args:
        width: Of a span.
        fresh: How far back a transaction may commit an end: spans are over for good after that.
        seconds: After how many seconds those that are not over are counted anew.
    """

    def __init__(self, width: timedelta = HOUR, fresh: timedelta = 10 * _MINUTE, seconds: float = 10.0) -> None:
        self._width = width
        self._fresh = fresh
        self._seconds = seconds
        self._spans: dict[datetime, Counter[MlJobStatus]] = {}
        self._recent: tuple[float, datetime, dict[datetime, Counter[MlJobStatus]]] | None = None
        self._made = time.monotonic()
        self._at_once = _FIRST

    def count(self, bind: Bind, since: datetime, model: Model, most: int = PAGE_JOBS) -> None:
        """Count what is not known, the newest spans first; begin no further statement after so many jobs.

        Args:
            bind: Where to read.
            since: When the first span begins.
            model: The mapped job class.
            most: About how many jobs.
        """
        begin, number = time.monotonic(), 0
        if begin - self._made > _KEPT_SECONDS:  # records may have been imported, or pruned
            self._spans, self._made = {}, begin
        over = self._over()
        if self._recent is None or begin - self._recent[0] > self._seconds or self._recent[1] != over:
            self._recent = begin, over, _by_start(jobs.finished_per(bind, self._width, since=over, model=model))
        while number < most and (end := self._unknown(since)) is not None:
            number += self._count_before(bind, end, max(since, end - self._at_once * self._width), model)

    def _count_before(self, bind: Bind, end: datetime, start: datetime, model: Model) -> int:
        found = _by_start(jobs.finished_per(bind, self._width, since=start, until=end, model=model))
        while end > start:
            end -= self._width
            self._spans[end] = found.get(end, Counter())
        number = sum(counted.total() for counted in found.values())
        if number < _FEW:
            self._at_once = min(self._at_once * 2, _MOST)
        elif number > _MANY:
            self._at_once = max(self._at_once // 2, 1)
        return number

    def _over(self) -> datetime:
        """Return the end of the spans that are over for good."""
        moment = utc_now() - self._fresh
        return moment - (moment - datetime.fromtimestamp(0, moment.tzinfo)) % self._width

    def _unknown(self, since: datetime) -> datetime | None:
        """Return the end of the newest span that is not counted; None where all are."""
        start = self._over() - self._width
        while start >= since:
            if start not in self._spans:
                return start + self._width
            start -= self._width
        return None

    def counted_from(self, since: datetime) -> datetime:
        """Return from when on all is counted."""
        return self._unknown(since) or since

    def per(self, width: timedelta, since: datetime) -> list[Finished]:
        """Return what is known, by spans that are each as long as several of ours, or as one.

        Args:
            width: Of a span.
            since: When the first begins.
        """
        spans: dict[datetime, Counter[MlJobStatus]] = {}
        recent = self._recent[2] if self._recent is not None else {}
        for hour, counted in sorted((self._spans | recent).items()):
            if hour >= since:
                start = since + (hour - since) // width * width
                spans.setdefault(start, Counter()).update(counted)
        return [Finished(start, status, number) for start, found in spans.items() for status, number in found.items()]


def _by_start(found: list[Finished]) -> dict[datetime, Counter[MlJobStatus]]:
    hours: dict[datetime, Counter[MlJobStatus]] = {}
    for one in found:
        hours.setdefault(one.start, Counter())[one.status] += one.jobs
    return hours
