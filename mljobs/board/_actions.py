"""What changes something: plain forms sent by POST, each checked for where it comes from before anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from mljobs import jobs
from mljobs._values import from_millis, to_job_id, to_millis, utc_now
from mljobs.board._access import Access, check_same_origin
from mljobs.board._site import THEME, Site, Viewer
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.jobs import Bind, Filter, JobSummary
from mljobs.states import ACTIVE, MlJobStatus

BODY_MOST = 65_536
"""Bytes of a form."""
MOST_AT_ONCE = 10_000
_BATCH = 200
_SHOWN = 5


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
        request, viewer, "done.html", here="now", heading="Rescue", lines=lines, errors=[], back=viewer.url("")
    )


# -------------------------------------------------------------------------------------------------------------- bulk


@dataclass(frozen=True, slots=True)
class Plan:
    """What an action on many jobs would do.

    Attributes:
        act: The jobs that it is for.
        left: How many are left alone, and why.
        more: Whether there are more than it takes at once.
    """

    act: list[JobSummary]
    left: dict[str, int]
    more: bool


def _plan(bind: Bind, model: Any, what: str, ids: Sequence[UUID] | None, asked: Filter) -> Plan:
    more = False
    if ids is None:
        page = jobs.summaries(bind, asked, limit=MOST_AT_ONCE, text=0, model=model)
        found, more = list(page.jobs), page.cursor is not None
    else:
        found = jobs.summaries_of(bind, ids, text=0, model=model)
    left: dict[str, int] = {}
    act = []
    retried = _retried(bind, model, [job.id for job in found]) if what == "retry" else {}
    for job in found:
        reason = _why_not(job, what, retried.get(job.id))
        if reason is None:
            act.append(job)
        else:
            left[reason] = left.get(reason, 0) + 1
    return Plan(act, left, more)


def _retried(bind: Bind, model: Any, ids: Sequence[UUID]) -> dict[UUID, str]:
    """Return of each job that has been retried what became of that."""
    found: dict[UUID, str] = {}
    for at in range(0, len(ids), _BATCH):
        for job_id, chain in jobs.chains(bind, ids[at : at + _BATCH], model=model).items():
            later = [
                job
                for job in chain
                if job.retry_of is not None and job.id != job_id and job.created_at >= chain[0].created_at
            ]
            mine = [job for job in later if _follows(job, job_id, chain)]
            if any(job.status in ACTIVE for job in mine):
                found[job_id] = "have been retried, and that retry is queued or running"
            elif any(job.status is MlJobStatus.COMPLETED for job in mine):
                found[job_id] = "completed at a later try"
            elif mine:
                found[job_id] = "have been retried; the last record of the work is the one to retry"
    return found


def _follows(job: JobSummary, job_id: UUID, chain: Sequence[JobSummary]) -> bool:
    by_id = {one.id: one for one in chain}
    seen = set()
    while job.retry_of is not None and job.id not in seen:
        if job.retry_of == job_id:
            return True
        seen.add(job.id)
        if job.retry_of not in by_id:
            return False
        job = by_id[job.retry_of]
    return False


def _why_not(job: JobSummary, what: str, retried: str | None) -> str | None:
    if what == "cancel":
        return "have finished and cannot be cancelled" if job.status.is_terminal else None
    if not job.status.is_terminal:
        return "have not finished"
    if job.status is MlJobStatus.COMPLETED:
        return "completed"
    return retried


def _what(form: Form) -> tuple[str, Access]:
    what = form.one("do")
    if what not in ("cancel", "retry"):
        raise HTTPException(422, "Cancel or retry?")
    return what, Access.CANCEL if what == "cancel" else Access.RETRY


def _asked(form: Form, site: Site) -> tuple[list[UUID] | None, Filter, int]:
    """Return the picked jobs, or None and a filter for all that were there when it was previewed."""
    as_of = form.one("as_of")
    moment = int(as_of) if as_of.isdecimal() and len(as_of) < 16 else to_millis(utc_now())
    if form.one("scope") != "all":
        ids = form.job_ids()
        if not ids:
            raise HTTPException(422, "No job was selected.")
        return ids, Filter(), moment
    asked = Filter.parse(form.one("q")[:2_000], site.backend.model)
    return None, asked & Filter(created_before=from_millis(moment + 1)), moment


async def preview(request: Request) -> Response:
    """Say what an action on many jobs would do, before it does."""
    site, viewer, form = await _form(request, Access.READ)
    what, wanted = _what(form)
    if not viewer.access.may(wanted):
        raise HTTPException(403, "You may not do this.")
    ids, asked, moment = _asked(form, site)
    model = site.backend.model
    plan = await site.backend.read(lambda bind: _plan(bind, model, what, ids, asked))
    return site.page(
        request,
        viewer,
        "bulk.html",
        here="jobs",
        heading=f"{what.capitalize()} {len(plan.act):,} jobs?",
        what=what,
        plan=plan,
        first=plan.act[:_SHOWN],
        running=sum(job.status is MlJobStatus.RUNNING for job in plan.act),
        ids=ids,
        q=form.one("q")[:2_000],
        as_of=moment,
        as_of_time=from_millis(moment),
    )


async def bulk(request: Request) -> Response:
    """Do it, some hundred at a time; what has changed meanwhile is left alone."""
    site, viewer, form = await _form(request, Access.READ)
    what, wanted = _what(form)
    if not viewer.access.may(wanted):
        raise HTTPException(403, "You may not do this.")
    ids, asked, _ = _asked(form, site)
    model, unless = site.backend.model, form.one("unless_active") == "1"
    plan = await site.backend.read(lambda bind: _plan(bind, model, what, ids, asked))
    done, errors = 0, []
    for at in range(0, len(plan.act), _BATCH):
        part = [job.id for job in plan.act[at : at + _BATCH]]
        number, failed = await site.backend.write(_each(part, what, unless, model))
        done += number
        errors += failed
    word = "cancelled" if what == "cancel" else "queued again, each as a new record"
    lines = [(done, word), *((number, reason) for reason, number in plan.left.items())]
    back = viewer.url("jobs", q=form.one("q")[:2_000])
    return site.page(
        request, viewer, "done.html", here="jobs", heading=what.capitalize(), lines=lines, errors=errors[:20], back=back
    )


def _each(ids: Sequence[UUID], what: str, unless: bool, model: Any) -> Callable[[Bind], tuple[int, list[str]]]:  # noqa: FBT001
    def work(bind: Bind) -> tuple[int, list[str]]:
        done, errors = 0, []
        for job_id in ids:
            try:
                if what == "cancel":
                    done += jobs.cancel(bind, job_id, model=model)
                else:
                    jobs.retry(bind, job_id, unless_active=unless, model=model)
                    done += 1
            except MlJobsError as error:
                errors.append(str(error))
        return done, errors

    return work
