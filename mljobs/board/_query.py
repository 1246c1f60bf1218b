"""What a page of jobs was asked for, from its address: filter, place, order; and the addresses of its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mljobs.errors import FilterError
from mljobs.jobs import Counts, Filter, FilterTerm, JobSummary, Model, SummaryPage, cursor_of
from mljobs.jobs._paging import ORDERS, Order
from mljobs.states import TERMINAL, MlJobStatus

MOST_TEXT = 2_000
"""Characters of a filter."""
MOST_NAME = 10_000
"""Characters of the name of a target."""
PAGE = 50
_MOST = 200
LOOK_SECONDS = 0.05
"""About how long a page looks for what no index serves."""
_BACK: Mapping[Order, Order] = {
    "newest": "oldest", "oldest": "newest", "last_finished": "first_finished", "first_finished": "last_finished"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tab:
    """A state, and the address of the same filter with it."""

    name: str
    q: str
    current: bool
    count: str


@dataclass(frozen=True, slots=True)
class Sort:
    """A column that a list can be sorted by."""

    name: str
    down: Order
    up: Order
    current: Order

    @property
    def aria(self) -> str:
        """How the list is sorted by it, as it is said to a screen reader."""
        return {self.down: "descending", self.up: "ascending"}.get(self.current, "none")

    @property
    def next(self) -> Order:
        """The order that a click leads to."""
        return self.up if self.current == self.down else self.down


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked.

    Attributes:
        text: The filter as it was typed.
        filter: What was understood.
        problems: What was not.
        after: Where the page starts.
        sort: In which order the rows stand.
        order: In which they are read: backwards for a page before another.
        limit: How many rows.
    """

    text: str
    filter: Filter
    problems: list[FilterError]
    after: str | None
    sort: Order
    order: Order
    limit: int

    @classmethod
    def of(cls, request: Request, model: Model) -> Asked:
        """Return what a request asks for."""
        query = request.query_params
        text = query.get("q", "")[:MOST_TEXT]
        found, problems = Filter.read(text, model)
        before = query.get("before")
        try:
            limit = max(1, min(_MOST, int(query.get("limit", PAGE))))
        except ValueError:
            limit = PAGE
        sort: Order = next((order for order in ORDERS if order == query.get("sort")), "newest")
        return cls(text, found, problems, before or query.get("after"), sort, _BACK[sort] if before else sort, limit)

    @property
    def by_end(self) -> bool:
        """Whether the rows stand in the order of their end."""
        return self.sort.endswith("finished")

    def sorts(self) -> list[Sort]:
        """Return the orders that a list can have, each a link from the head of its column."""
        own = [
            Sort("Created", "newest", "oldest", self.sort),
            Sort("Finished", "last_finished", "first_finished", self.sort),
        ]
        return own[::-1] if self.by_end else own

    def _query(self, **more: Any) -> dict[str, Any]:
        found = {"q": self.text, "sort": None if self.sort == "newest" else self.sort}
        return found | {"limit": None if self.limit == PAGE else self.limit} | more

    @property
    def heading(self) -> str:
        """The title of the page."""
        if self.problems:
            return "Filter not understood"
        return f"Jobs {self.filter}"[:80] if self.filter else "Jobs"

    @property
    def words(self) -> str:
        """The filter as a sentence."""
        said = self.filter.words()
        return said[:1].upper() + said[1:]

    @property
    def others(self) -> bool:
        """Whether anything but a state was asked for."""
        return any(term.name != "status" for term in self.filter.terms)

    @property
    def spec_keys(self) -> tuple[str, ...]:
        """Paths in the spec that the filter names."""
        return tuple(".".join(term.path) for term in self.filter.terms if term.name == "spec")

    @property
    def chips(self) -> list[tuple[FilterTerm, str]]:
        """Each term, and the filter without it."""
        return [(term, str(self.filter.without(term))) for term in self.filter.terms]

    def tabs(self, counts: Counts | None) -> list[Tab]:
        """Return a tab for each state."""
        rest = Filter(*(term for term in self.filter.terms if term.name != "status"))
        asked = [term for term in self.filter.terms if term.name == "status"]
        chosen = {str(value) for term in asked for value in term.values}
        tabs = [Tab("All", str(rest), not asked, _figure(counts, None))]
        for status in MlJobStatus:
            with_it = Filter(*rest.terms, status=str(status))
            tabs.append(Tab(status.capitalize(), str(with_it), chosen == {str(status)}, _figure(counts, status)))
        return tabs

    def newer(self, page: SummaryPage, rows: Sequence[JobSummary]) -> dict[str, Any] | None:
        """Return the query of the page before this one; None where there is none."""
        if not rows or (self.order == self.sort and self.after is None):
            return None
        if self.order != self.sort and page.cursor is None:
            return self._query()
        return self._query(before=cursor_of(rows[0], _BACK[self.sort]))

    def older(self, page: SummaryPage, rows: Sequence[JobSummary]) -> dict[str, Any] | None:
        """Return the query of the page after this one; None where there is none."""
        if self.order == self.sort:
            return self._query(after=page.cursor) if page.cursor else None
        return self._query(after=cursor_of(rows[-1], self.sort)) if rows else None


def _figure(counts: Counts | None, status: MlJobStatus | None) -> str:
    if counts is None:
        return ""
    about = "" if counts.exact or (status is not None and status not in TERMINAL) else "≈ "
    total = counts.total(status=status)
    if about:
        total = round(total, -max(0, len(str(total)) - 3))  # three digits are all that statistics know
    return f"{about}{total:,}"
