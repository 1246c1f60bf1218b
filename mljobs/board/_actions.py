"""What changes something: plain forms sent by POST, each checked for where it comes from before anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from mljobs import jobs
from mljobs._values import from_millis, to_job_id, to_millis, utc_now
from mljobs.board._access import Access, check_same_origin
from mljobs.board._format import plural
from mljobs.board._query import MOST_TEXT
from mljobs.board._site import THEME, Site, Viewer
from mljobs.errors import InvalidValueError
from mljobs.jobs import Action, Batch, Bind, Filter, JobSummary
from mljobs.jobs._bulk import changed_by
from mljobs.jobs._filters import Selection
from mljobs.states import MlJobStatus

BODY_MOST = 65_536
"""Bytes of a form."""
MOST_AT_ONCE = 10_000
_BATCH = 200
_SHOWN = 5
_DIGITS = 16


class Form:
    """The fields of a form.

    Args:
        fields: By name.
    """

    def __init__(self, fields: dict[str, list[str]]) -> None:
        self._fields = fields

    def one(self, name: str, default: str = "") -> str:
        """Return a field."""
        return self._fields.get(name, [default])[0]

    def job_ids(self) -> list[UUID]:
        """Return the jobs that were picked.

        Raises:
            HTTPException: One of them is no id (422).
        """
        try:
            return list(dict.fromkeys(to_job_id(text) for text in self._fields.get("id", [])))
        except InvalidValueError as error:
            raise HTTPException(422, "One of these is not the id of a job.") from error


async def body_of(request: Request, most: int = BODY_MOST) -> bytes:
    """Return the body of a request.

    Raises:
        HTTPException: It is larger than ``most`` (413).
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413, "This is more than a form of the board holds.")
    return bytes(body)


async def _form(request: Request, wanted: Access) -> tuple[Site, Viewer, Form]:
    """Return who sends which form.

    Raises:
        HTTPException: It comes from elsewhere, or its sender may not do this (403); it is too large (413).
    """
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    check_same_origin(request)
    if not viewer.access.may(wanted):
        raise HTTPException(403, "You may not do this.")
    try:
        text = (await body_of(request)).decode()
        form = Form(parse_qs(text, keep_blank_values=True, max_num_fields=2_000))
    except ValueError as error:
        raise HTTPException(400, "This is no form of the board.") from error
    site.tokens.check(form.one("token"))
    return site, viewer, form


def _to(viewer: Viewer, path: str) -> Response:
    return RedirectResponse(viewer.url(path), 303)


async def theme(request: Request) -> Response:
    """Keep whether the board is light or dark, in its one cookie."""
    _, viewer, form = await _form(request, Access.READ)
    back = form.one("back")
    answer = RedirectResponse(back if viewer.url.leads_here(back) else viewer.url(""), 303)
    chosen = form.one("theme")
    if chosen in ("light", "dark"):
        answer.set_cookie(
            THEME, chosen, max_age=31_536_000, path=viewer.url.root or "/", samesite="lax", httponly=False,
            secure=request.url.scheme == "https",
        )  # fmt: skip
    return answer


async def cancel(request: Request) -> Response:
    """Cancel a job; of a running one ask first."""
    site, viewer, form = await _form(request, Access.CANCEL)
    job_id, model = _one_id(form), site.backend.model
    found = await site.backend.read(lambda bind: jobs.summaries_of(bind, [job_id], text=0, model=model))
    if not found:
        raise HTTPException(404, "There is no job with this id.")
    if found[0].status is MlJobStatus.RUNNING and form.one("confirmed") != "1":
        return site.page(
            request, viewer, "confirm_cancel.html", here="jobs", heading="Cancel a running job?", job=found[0]
        )
    await site.backend.write(lambda bind: jobs.cancel(bind, job_id, model=model))
    return _to(viewer, f"jobs/{job_id}")


def _one_id(form: Form) -> UUID:
    ids = form.job_ids()
    if len(ids) != 1:
        raise HTTPException(422, "Exactly one job was expected.")
    return ids[0]


async def retry(request: Request) -> Response:
    """Queue a finished job's work again."""
    site, viewer, form = await _form(request, Access.RETRY)
    job_id, model = _one_id(form), site.backend.model
    unless = form.one("unless_active") == "1"
    again = await site.backend.write(
        lambda bind: jobs.retry(bind, job_id, unless_active=unless, again=True, model=model)
    )
    return _to(viewer, f"jobs/{again.id}")


async def rescue(request: Request) -> Response:
    """Put the jobs of silent workers back into the queue."""
    site, viewer, _ = await _form(request, Access.RESCUE)
    model = site.backend.model
    done = await site.backend.write(lambda bind: jobs.rescue(bind, model=model))
    found = [
        ("queued again", len(done.requeued)),
        ("failed, after too many attempts", len(done.failed)),
        ("leases of finished jobs removed", len(done.released)),
        ("could not be changed", len(done.errors)),
    ]
    lines = [(number, word) for word, number in found if number]
    return site.page(
        request, viewer, "done.html", here="now", heading="Rescue", lines=lines, errors=[], note="", back=viewer.url("")
    )


# -------------------------------------------------------------------------------------------------------------- bulk


@dataclass(frozen=True, slots=True)
class Plan:
    """What an action on many jobs would do.

    Attributes:
        number: How many jobs it is for.
        running: How many of them run.
        first: Some of them, the newest first.
        left: How many are left alone, and why.
        complete: Whether all jobs were counted, not only the latest 100,000.
    """

    number: int
    running: int
    first: Sequence[JobSummary]
    left: dict[str, int]
    complete: bool


def _plan(bind: Bind, model: Any, what: Action, asked: Filter) -> Plan:
    counted = jobs.counts(bind, asked, model=model)
    changed = jobs.affected(bind, what, asked, exact=False, model=model)
    chosen = changed_by(what, Selection(asked, (), model))
    first = jobs.summaries(bind, chosen.filter, where=chosen.where, limit=_SHOWN, text=0, model=model).jobs
    number = changed.total()
    at_work = counted.total(status=MlJobStatus.QUEUED) + counted.total(status=MlJobStatus.RUNNING)
    completed = counted.total(status=MlJobStatus.COMPLETED) - changed.total(status=MlJobStatus.COMPLETED)
    left = (
        {"finished, and cannot be cancelled": counted.total() - at_work}
        if what == "cancel"
        else {
            "not finished": at_work,
            "completed": completed,
            "retried already": counted.total() - at_work - completed - number,
        }
    )
    running = changed.total(status=MlJobStatus.RUNNING)
    return Plan(number, running, first, {why: found for why, found in left.items() if found > 0}, changed.complete)


def _what(form: Form) -> tuple[Action, Access]:
    what = form.one("do")
    if what == "cancel":
        return "cancel", Access.CANCEL
    if what == "retry":
        return "retry", Access.RETRY
    raise HTTPException(422, "Cancel or retry?")


def _asked(form: Form, site: Site) -> tuple[list[UUID] | None, Filter, int]:
    """Return the picked jobs, or None; what means them, or all that were there when it was previewed; and when that was."""
    as_of = form.one("as_of")
    moment = to_millis(utc_now())
    if as_of.isascii() and as_of.isdigit() and len(as_of) < _DIGITS:
        moment = min(int(as_of), moment)
    if form.one("scope") != "all":
        ids = form.job_ids()
        if not ids:
            raise HTTPException(422, "No job was selected.")
        return ids, _any_of(ids), moment
    asked = Filter.parse(form.one("q")[:MOST_TEXT], site.backend.model)
    return None, asked & Filter(created_before=from_millis(moment + 1)), moment


def _any_of(ids: Sequence[UUID]) -> Filter:
    (first, *others) = (Filter(id=job_id).terms[0] for job_id in ids)
    return Filter(replace(first, values=(*first.values, *(value for term in others for value in term.values))))


async def preview(request: Request) -> Response:
    """Say what an action on many jobs would do, before it does."""
    site, viewer, form = await _form(request, Access.READ)
    what, wanted = _what(form)
    if not viewer.access.may(wanted):
        raise HTTPException(403, "You may not do this.")
    ids, asked, moment = _asked(form, site)
    model = site.backend.model
    plan = await site.backend.read(lambda bind: _plan(bind, model, what, asked))
    about = "" if plan.complete else "about "
    return site.page(
        request,
        viewer,
        "bulk.html",
        here="jobs",
        heading=f"{what.capitalize()} {about}{plural(plan.number, 'job')}?",
        what=what,
        plan=plan,
        ids=ids,
        q=form.one("q")[:MOST_TEXT],
        as_of=moment,
        as_of_time=from_millis(moment),
        most=MOST_AT_ONCE,
    )


async def bulk(request: Request) -> Response:
    """Do it, some hundred at a time, the oldest first; what has changed meanwhile is left alone."""
    site, viewer, form = await _form(request, Access.READ)
    what, wanted = _what(form)
    if not viewer.access.may(wanted):
        raise HTTPException(403, "You may not do this.")
    _, asked, _ = _asked(form, site)
    options: dict[str, Any] = {"batch": _BATCH, "model": site.backend.model}
    act: Callable[..., Batch] = jobs.cancel_batch
    if what == "retry":
        act, options = jobs.retry_batch, {**options, "unless_active": form.one("unless_active") == "1"}
    done, errors, after = 0, list[str](), None
    while True:
        batch = await site.backend.write(partial(act, filter=asked, after=after, **options))
        done += len(batch.jobs)
        errors += map(str, batch.errors.values())
        after = batch.cursor
        if after is None or done >= MOST_AT_ONCE:
            break
    lines = [(done, "cancelled" if what == "cancel" else "queued again, each as a new record")]
    if errors:
        lines.append((len(errors), "could not be changed"))
    note = f"These were the oldest {MOST_AT_ONCE:,}; do it again for the others." if after is not None else ""
    return site.page(
        request,
        viewer,
        "done.html",
        here="jobs",
        heading=what.capitalize(),
        lines=lines,
        errors=errors[:20],
        note=note,
        back=viewer.url("jobs", q=form.one("q")[:MOST_TEXT]),
    )
