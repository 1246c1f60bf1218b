"""What a page of jobs was asked for, from its address: filter, place, order; and the addresses of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request

from mljobs.errors import FilterError
from mljobs.jobs import Counts, Filter, FilterTerm, JobSummary, Model, SummaryPage, cursor_of
from mljobs.states import TERMINAL, MlJobStatus

MOST_TEXT = 2_000
"""Characters of a filter."""
PAGE = 50
_MOST = 200


@dataclass(frozen=True, slots=True)
class Tab:
    """A state, and the address of the same filter with it."""

    name: str
    q: str
    current: bool
    count: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked.

    Attributes:
        text: The filter as it was typed.
        filter: What was understood.
        problems: What was not.
        after: Where the page starts.
        order: ``"oldest"`` for a page before another.
        limit: How many rows.
    """

    text: str
    filter: Filter
    problems: list[FilterError]
    after: str | None
    order: Literal["newest", "oldest"]
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
        return cls(text, found, problems, before or query.get("after"), "oldest" if before else "newest", limit)

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
        """Return the query of the page of newer jobs; None where there is none."""
        if not rows or (self.order == "newest" and self.after is None):
            return None
        if self.order == "oldest" and page.cursor is None:
            return {"q": self.text}
        return {"q": self.text, "before": cursor_of(rows[0], "oldest")}

    def older(self, page: SummaryPage, rows: Sequence[JobSummary]) -> dict[str, Any] | None:
        """Return the query of the page of older jobs; None where there is none."""
        if self.order == "newest":
            return {"q": self.text, "after": page.cursor} if page.cursor else None
        return {"q": self.text, "after": cursor_of(rows[-1], "newest")} if rows else None


def _figure(counts: Counts | None, status: MlJobStatus | None) -> str:
    if counts is None:
        return ""
    about = "" if counts.exact or (status is not None and status not in TERMINAL) else "≈ "
    total = counts.total(status=status)
    if about:
        total = round(total, -max(0, len(str(total)) - 3))  # three digits are all that statistics know
    return f"{about}{total:,}"
