"""What must hold at the end, each sentence checked against the audit and the ledger."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mljobs.states import TERMINAL, TRANSITIONS, MlJobStatus
from tests.slow.chaos import RETRIES
from tests.slow.chaos.audit import Event
from tests.slow.chaos.ledger import Call

_RETRIED = ("backfill", "feature_refresh")
_TOKEN = re.compile(r"^RuntimeError: token=(\d+)\b")


@dataclass
class Evidence:
    """What there is to judge by.

    Attributes:
        submitted: The ids of what was submitted, as hex.
        rows: Every record at the end, by id.
        leases: How many leases are left.
        events: The audit.
        calls: The ledger, by job and token.
        max_attempts: As the workers have it.
    """

    submitted: set[str]
    rows: dict[str, dict[str, Any]]
    leases: int
    events: list[Event]
    calls: dict[tuple[str, int], Call]
    max_attempts: int
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_job: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            self.by_job[event.job].append(event)
        self.leased: dict[tuple[str, int], Event] = {}
        self.locked: dict[int, Event] = {}
        self.unlocked: dict[int, Event] = {}
        for event in self.events:
            if event.claimed is not None:
                self.leased[event.job, event.claimed] = event
            row = event.new or event.old or {}
            if event.what == "ml_job_leases" and row["target_lock"] is not None:
                (self.locked if event.op == "INSERT" else self.unlocked)[row["token"]] = event

    def tokens(self, job: str) -> list[int]:
        """Return the tokens under which a job was claimed, in order."""
        return [event.claimed for event in self.by_job[job] if event.claimed is not None]

    def accepted(self) -> set[tuple[str, int]]:
        """Return job and token of the results that were recorded."""
        return {(job, token) for job, row in self.rows.items() if (token := accepted_token(row)) is not None}

    def says(self, why: str) -> None:
        self.wrong.append(why)


def judge(evidence: Evidence) -> Counter[str]:
    """Check everything; what is wrong is in ``evidence.wrong`` afterwards. Return counts of what was seen."""
    counts: Counter[str] = Counter()
    _none_lost(evidence)
    for job, row in evidence.rows.items():
        _one_life(evidence, job, row)
        counts[f"jobs {row['status']}"] += 1
    _tokens(evidence)
    _results(evidence, counts)
    _side_effects(evidence, counts)
    _exclusive(evidence, counts)
    _retries(evidence, counts)
    return counts


def _none_lost(evidence: Evidence) -> None:
    """Every job that was submitted is there, and nothing else but retries; no lease is left."""
    for job in evidence.submitted - set(evidence.rows):
        evidence.says(f"job {job} is lost")
    for job in set(evidence.rows) - evidence.submitted:
        if evidence.rows[job]["retry_of"] is None:
            evidence.says(f"job {job} was never submitted")
    if evidence.leases:
        evidence.says(f"{evidence.leases} leases are left")


def _one_life(evidence: Evidence, job: str, row: dict[str, Any]) -> None:
    """A record goes along legal edges, each change seen; it becomes final once, and is not written after that."""
    if row["status"] not in {str(status) for status in TERMINAL}:
        evidence.says(f"job {job} is {row['status']} at the end")
    life = [event for event in evidence.by_job[job] if event.what == "ml_jobs"]
    if not life or life[0].op != "INSERT" or life[0].new is None or life[0].new["status"] != "queued":
        evidence.says(f"job {job} did not begin as queued")
        return
    for before, event in pairwise(life):
        if event.op != "UPDATE" or event.new is None:
            evidence.says(f"job {job} was written by {event.op}")
            return
        if event.old != before.new:
            evidence.says(f"job {job} changed unseen between {before.n} and {event.n}")
        old, new = MlJobStatus(before.new["status"]), MlJobStatus(event.new["status"])  # type: ignore[index]
        if old in TERMINAL:
            evidence.says(f"job {job} was {old} and was written again: {event}")
        elif new is not old and new not in TRANSITIONS[old]:
            evidence.says(f"job {job} went from {old} to {new}")
    last = life[-1].new or {}
    if any(str(last[name]) != str(row[name]) for name in ("status", "attempts", "progress", "retry_of")):
        evidence.says(f"job {job} is not as it was last written")


def _tokens(evidence: Evidence) -> None:
    """Tokens grow with each claim of a job and never come back; attempts count the claims."""
    for job, row in evidence.rows.items():
        tokens = evidence.tokens(job)
        if sorted(set(tokens)) != tokens:
            evidence.says(f"job {job} had tokens {tokens}")
        if row["attempts"] != len(tokens):
            evidence.says(f"job {job} counts {row['attempts']} attempts, but was claimed {len(tokens)} times")
    made = [e.new["token"] for e in evidence.events if e.what == "ml_job_leases" and e.op == "INSERT" and e.new]
    if len(made) != len(set(made)):
        evidence.says("a token came back")


def accepted_token(row: dict[str, Any]) -> int | None:
    """Return the token under which the recorded result was made; None where no handler's result was recorded."""
    if row["status"] == "completed":
        metrics = row["metrics_json"]
        return int((json.loads(metrics) if isinstance(metrics, str) else metrics)["token"])
    if row["status"] == "failed":
        named = _TOKEN.match(row["error_message"] or "")
        return int(named[1]) if named else None
    return None


def _results(evidence: Evidence, counts: Counter[str]) -> None:
    """A result is of the lease that was held last, written as that lease ended; else the rescue gave up, as it may."""
    for job, row in evidence.rows.items():
        if row["status"] == "cancelled":
            continue
        token, tokens = accepted_token(row), evidence.tokens(job)
        last = max(tokens, default=0)
        if token is None:
            counts["jobs failed by the rescue after their last attempt"] += 1
            counts["jobs failed by the rescue, their handler never called"] += not any(
                (job, claimed) in evidence.calls for claimed in tokens
            )
            reason = str(row["error_message"])
            if not reason.startswith("gave up after") or row["attempts"] < evidence.max_attempts:
                evidence.says(f"job {job} failed after {row['attempts']} attempts: {reason}")
        elif token != last:
            evidence.says(f"job {job} has the result of lease {token}, but {last} held it last")
        elif (job, token) not in evidence.calls or evidence.calls[job, token].ended is None:
            evidence.says(f"job {job} has a result, but its handler did not come to its end")
        final = evidence.by_job[job][-1]
        unlocked = evidence.unlocked.get(last)
        if (final.old or {}).get("lease") != last or (final.new or {}).get("lease") is not None:
            evidence.says(f"job {job} ended without its lease in one statement")
        elif last in evidence.locked and (unlocked is None or unlocked.tx != final.tx):
            evidence.says(f"job {job} ended without its target's lock in one transaction")


def _side_effects(evidence: Evidence, counts: Counter[str]) -> None:
    """A handler is called once for a token at most, and only for a lease that was made for this job."""
    calls: Counter[str] = Counter()
    for (job, token), call in evidence.calls.items():
        calls[call.job] += 1
        if (job, token) not in evidence.leased or call.job != job:
            evidence.says(f"a handler ran for job {call.job} under token {token}, which was never given for it")
    for job, number in calls.items():
        if job in evidence.rows and number > evidence.rows[job]["attempts"]:
            evidence.says(f"job {job} had {number} calls in {evidence.rows[job]['attempts']} attempts")
    accepted = evidence.accepted()
    counts["claims"] = len(evidence.leased)
    counts["claims that no handler was called for"] = len(set(evidence.leased) - set(evidence.calls))
    counts["calls of handlers"] = len(evidence.calls)
    counts["calls whose result was recorded"] = len(accepted)
    counts["calls that came to their end, result dropped"] = sum(
        call.ended is not None and key not in accepted for key, call in evidence.calls.items()
    )
    counts["jobs whose handler was called more than once"] = sum(number > 1 for number in calls.values())


def _exclusive(evidence: Evidence, counts: Counter[str]) -> None:
    """Of an exclusive target one lease stands at a time, and the runs whose results stand do not overlap in time.

    More cannot be promised: a process that stood still past its lease does not know it until it wakes, and may run for a
    moment beside its successor. What it did is dropped; such runs are counted.
    """
    holder: dict[str, int] = {}
    runs: dict[str, list[tuple[Call, bool]]] = defaultdict(list)
    accepted = evidence.accepted()
    for event in evidence.events:
        row = event.new or event.old or {}
        if event.what != "ml_job_leases" or row["target_lock"] is None:
            continue
        target, token = row["target_lock"], row["token"]
        if event.op == "INSERT":
            if target in holder:
                evidence.says(f"target {target} was leased by {token} while {holder[target]} held it")
            holder[target] = token
            (job,) = [of for of, claimed in evidence.leased if claimed == token] or [""]
            if (job, token) in evidence.calls:
                runs[target].append((evidence.calls[job, token], (job, token) in accepted))
        elif holder.pop(target, None) != token:
            evidence.says(f"target {target}: lease {token} ended, but did not stand")
    for target, calls in runs.items():
        stand = sorted((call for call, stands in calls if stands), key=lambda call: call.begun)
        counts["runs on exclusive targets whose result stands"] += len(stand)
        for one, other in pairwise(stand):
            if one.ended is None or other.begun < one.ended:
                evidence.says(f"target {target}: two results stand whose runs overlap, {one} and {other}")
        every = sorted((call for call, _ in calls if call.ended is not None), key=lambda call: call.begun)
        counts["runs on exclusive targets that overlapped, one of them dropped"] += sum(
            other.begun < (one.ended or 0) for one, other in pairwise(every)
        )


def _retries(evidence: Evidence, counts: Counter[str]) -> None:
    """A failure of a kind with retries leads to one new record, in the same transaction, until there were enough."""
    children: dict[str, list[str]] = defaultdict(list)
    for job, row in evidence.rows.items():
        if row["retry_of"] is not None:
            children[str(row["retry_of"]).replace("-", "")].append(job)

    def depth(job: str) -> int:
        parent = evidence.rows[job]["retry_of"]
        return 0 if parent is None else 1 + depth(str(parent).replace("-", ""))

    for job, row in evidence.rows.items():
        failed = row["status"] == "failed" and accepted_token(row) is not None
        wanted = int(failed and row["kind"] in _RETRIED and depth(job) < RETRIES)
        counts["retries"] += wanted
        if len(children[job]) != wanted:
            evidence.says(f"job {job} ({row['kind']}, {row['status']}) has {len(children[job])} retries, not {wanted}")
        for child in children[job]:
            born = evidence.by_job[child][0]
            died = max((e for e in evidence.by_job[job] if e.what == "ml_jobs"), key=lambda event: event.n)
            if born.tx != died.tx:
                evidence.says(f"job {job} and its retry {child} were written in two transactions")
