"""A short battle on each database; the long one is ``python -m tests.slow.chaos``, see docs/chaos.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slow.chaos.audit import Event
from tests.slow.chaos.battle import Plan, fight
from tests.slow.chaos.ledger import Call
from tests.slow.chaos.saboteur import PROCESS_ACTS, SERVER_ACTS
from tests.slow.chaos.verdict import Evidence, judge

_DONE = (
    "SIGSTOPs past the lease",
    "kills of a worker that held leases",
    "stops by SIGTERM",
    "stops by SIGTERM twice",
    "cancels that came in time",
    "retries",
)
_DONE_TO_THE_SERVER = (
    "partitions past the lease",
    "resets of the network",
    "server restarts, fast",
    "server restarts, immediate",
)


@pytest.mark.parametrize(
    ("database", "acts", "done"),
    [("sqlite", PROCESS_ACTS, _DONE), ("postgresql", PROCESS_ACTS + SERVER_ACTS, _DONE + _DONE_TO_THE_SERVER)],
)
def test_no_fault_loses_duplicates_or_changes_a_job(
    database: str, acts: tuple[str, ...], done: tuple[str, ...], tmp_path: Path
) -> None:
    report = fight(Plan(database, jobs=400, acts=len(acts), seed=11, bound=300), tmp_path)
    assert report.wrong == []
    assert {what: report.counts[what] for what in done if not report.counts[what]} == {}


# ------------------------------------------------------------------------------------- the verdict is no rubber stamp

_JOB = "0" * 31 + "1"


def _row(status: str, **values: object) -> dict[str, object]:
    started = {"completed": 100, "running": 0}.get(status, 0)
    row = {"id": _JOB, "kind": "train", "status": status, "attempts": int(status != "queued"), "progress": started}
    result = {"metrics_json": '{"token": 7}'} if status == "completed" else {"metrics_json": None}
    row["lease"] = 7 if status == "running" else None
    return {**row, **result, "error_message": None, "retry_of": None, **values}


def _lease(token: int, target: str | None = None) -> dict[str, object]:
    return {"token": token, "worker": "w", "target_lock": target}


def _good() -> list[Event]:
    queued, running, completed = _row("queued"), _row("running"), _row("completed")
    return [
        Event(1, "a", "ml_jobs", "INSERT", None, queued),
        Event(2, "b", "ml_job_leases", "INSERT", None, _lease(7, "only")),
        Event(3, "b", "ml_jobs", "UPDATE", queued, running),
        Event(4, "c", "ml_job_leases", "DELETE", _lease(7, "only"), None),
        Event(5, "c", "ml_jobs", "UPDATE", running, completed),
    ]


def _judged(events: list[Event], *, row: dict[str, object] | None = None, call: Call | None = None) -> list[str]:
    calls = {(_JOB, 7): call or Call(_JOB, 7, 1, 10, 20)}
    evidence = Evidence({_JOB}, {_JOB: row or _row("completed")}, 0, events, calls, 5)
    judge(evidence)
    return evidence.wrong


def test_a_correct_sequence_of_events_is_accepted() -> None:
    assert _judged(_good()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            Event(6, "d", "ml_jobs", "UPDATE", _row("completed"), _row("completed")),
            "was completed and was written again",
        ),
        (Event(6, "d", "ml_jobs", "DELETE", _row("completed"), None), "was written by DELETE"),
        (Event(6, "d", "ml_jobs", "UPDATE", _row("running"), _row("completed")), "changed unseen"),
        (
            Event(6, "d", "ml_jobs", "UPDATE", _row("queued"), _row("running", lease=9)),
            "counts 1 attempts, but was claimed 2 times",
        ),
        (Event(6, "d", "ml_job_leases", "INSERT", None, _lease(7)), "a token came back"),
        (
            Event(6, "d", "ml_jobs", "UPDATE", _row("queued"), _row("running", lease=9)),
            "result of lease 7, but 9 held it last",
        ),
    ],
)
def test_each_forbidden_event_is_reported(more: Event, said: str) -> None:
    assert any(said in why for why in _judged([*_good(), more]))


def test_a_result_without_its_handlers_end_or_its_own_lease_is_reported() -> None:
    assert "did not come to its end" in _judged(_good(), call=Call(_JOB, 7, 1, 10, None))[0]
    assert "never given for it" in "".join(_judged(_good(), call=Call("0" * 32, 7, 1, 10, 20)))
    late = [*_good()[:4], Event(5, "other", "ml_jobs", "UPDATE", _row("running"), _row("completed"))]
    assert "ended without its target's lock in one transaction" in _judged(late)[0]
    kept = [*_good()[:4], Event(5, "c", "ml_jobs", "UPDATE", _row("running"), _row("completed", lease=7))]
    assert "ended without its lease in one statement" in _judged(kept)[0]
    assert "is running at the end" in _judged(_good()[:3], row=_row("running"))[0]


def test_two_overlapping_runs_on_one_exclusive_target_are_reported() -> None:
    other = "0" * 31 + "2"
    events = _good()
    for event in _good():
        rows = [
            None
            if row is None
            else {
                key: {_JOB: other, 7: 8, '{"token": 7}': '{"token": 8}'}.get(value, value)  # type: ignore[call-overload]
                for key, value in row.items()
            }
            for row in (event.old, event.new)
        ]
        events.append(Event(event.n + 5, f"{event.tx}2", event.what, event.op, *rows))
    second = _row("completed", id=other, metrics_json='{"token": 8}')
    calls = {(_JOB, 7): Call(_JOB, 7, 1, 10, 20), (other, 8): Call(other, 8, 2, 19, 30)}
    evidence = Evidence({_JOB, other}, {_JOB: _row("completed"), other: second}, 0, events, calls, 5)
    judge(evidence)
    assert len(evidence.wrong) == 1
    assert "whose runs overlap" in evidence.wrong[0]
