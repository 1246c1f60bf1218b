"""Every operation on jobs, written once, on the caller's own session.

Each function takes the caller's ``Session`` (or a Core ``Connection``) first and is part of its transaction: nothing is
committed here. :class:`mljobs.JobStore` and :class:`mljobs.AsyncJobStore` are the same operations with an
engine and a transaction of their own.

What writes:

- :mod:`~mljobs.jobs._submitting`: queue jobs (``submit``, ``submit_many``)
- :mod:`~mljobs.jobs._retrying`: queue the work of a finished job again (``retry``)
- :mod:`~mljobs.jobs._claiming`: claim jobs (``claim``, ``claim_one``)
- :mod:`~mljobs.jobs._holding`: renew leases, report, give claims back (``renew``, ``look``, ``release``, ``report``,
  ``set_progress``)
- :mod:`~mljobs.jobs._finishing`: record outcomes (``complete``, ``fail``, ``requeue``), and ``cancel``
- :mod:`~mljobs.jobs._exchanging`: record outcomes and claim in one statement (``finish_and_claim``)
- :mod:`~mljobs.jobs._rescuing`: requeue or fail the jobs whose lease has expired (``rescue``)
- :mod:`~mljobs.jobs._pruning`: delete old finished records (``prune``)
- :mod:`~mljobs.jobs._bulk`: cancel or retry many by a filter (``affected``, ``cancel_batch``, ``retry_batch``)

What reads:

- :mod:`~mljobs.jobs._reading`: jobs and their number (``get``, ``find``, ``history``, ``lineage``, ``counts``)
- :mod:`~mljobs.jobs._naming`: the job that a short id names (``find_id``)
- :mod:`~mljobs.jobs._best`: the best runs by a metric (``best``)
- :mod:`~mljobs.jobs._summaries`: jobs with what a list shows (``summaries``, ``running_jobs``, ``chains``)
- :mod:`~mljobs.jobs._load`: figures by kind and by worker (``stats``, ``holders``)
- :mod:`~mljobs.jobs._statistics`: figures over many jobs (``finished_per``, ``durations``, ``failure_reasons``)
- :mod:`~mljobs.jobs._queue`: the queue (``queue_depths``, ``next_claims``, ``held_in_queue``)
- :mod:`~mljobs.jobs._targets`: the targets (``target_names``, ``target_jobs``)
- :mod:`~mljobs.jobs._workers`: the workers (``workers``)
- :mod:`~mljobs.jobs._changes`: the states of jobs, for watches

What they are made of:

- :mod:`~mljobs.jobs._base`: sessions, connections and tables; :mod:`~mljobs.jobs._records`: rows as objects
- :mod:`~mljobs.jobs._statements`: parts of statements; :mod:`~mljobs.jobs._transitions`: the SET list of each transition
- claims: :mod:`~mljobs.jobs._claims` (``Claim``), :mod:`~mljobs.jobs._picking` (the SELECT), :mod:`~mljobs.jobs._starting`
  (the parts on SQLite), :mod:`~mljobs.jobs._refusing` (a job that cannot be started)
- writes under a lease: :mod:`~mljobs.jobs._fencing`; why one was refused: :mod:`~mljobs.jobs._refusals`
- filters: :mod:`~mljobs.jobs._filters` (``Filter``), :mod:`~mljobs.jobs._words` (its text as terms),
  :mod:`~mljobs.jobs._sentences` (its terms as English), :mod:`~mljobs.jobs._conditions` (its terms as SQL),
  :mod:`~mljobs.jobs._expressions` (SQL that differs by database)
- pages: :mod:`~mljobs.jobs._paging`, :mod:`~mljobs.jobs._serving` (which index serves a filter)
- many rows: :mod:`~mljobs.jobs._batches`, :mod:`~mljobs.jobs._savepoints`

Every write names the state it expects, and a worker's write the lease it holds, in the condition of its own statement.
On PostgreSQL each is one statement, and times come from the database's clock. On SQLite, where one writer works at a
time, each takes the write lock before it reads.
"""

from mljobs.db._binds import Bind
from mljobs.jobs._base import JobRef, Model, accept_any_session, table_of
from mljobs.jobs._best import best
from mljobs.jobs._bulk import Action, Batch, affected, cancel_batch, retry_batch
from mljobs.jobs._claiming import DEFAULT_LEASE, claim, claim_one
from mljobs.jobs._claims import Claim, Renewal
from mljobs.jobs._exchanging import finish_and_claim
from mljobs.jobs._filters import FILTERS, Filter, Filters, Where, conditions
from mljobs.jobs._finishing import (
    Outcome,
    cancel,
    complete,
    complete_many,
    fail,
    fail_many,
    finish_many,
    requeue,
    requeue_many,
)
from mljobs.jobs._holding import (
    Report,
    look,
    release,
    renew,
    report,
    report_many,
    set_progress,
    set_progress_many,
)
from mljobs.jobs._load import Holder, KindStats, Stats, holders, stats
from mljobs.jobs._naming import find_id
from mljobs.jobs._paging import cursor_of
from mljobs.jobs._pruning import Cursor, Pruned, prunable, prune, prune_batch
from mljobs.jobs._queue import Queue, QueueDepth, held_in_queue, next_claims, queue_depths
from mljobs.jobs._reading import Counts, Page, counts, find, get, history, lineage
from mljobs.jobs._rescuing import Rescue, rescue
from mljobs.jobs._retrying import retry
from mljobs.jobs._statistics import (
    Durations,
    Finished,
    KindDurations,
    Reason,
    Reasons,
    Spread,
    durations,
    failure_reasons,
    finished_per,
    last_failures,
    pattern_of,
    usual_durations,
)
from mljobs.jobs._submitting import submit, submit_many
from mljobs.jobs._summaries import (
    JobSummary,
    SummaryPage,
    chain,
    chains,
    held_after_end,
    running_jobs,
    summaries,
    summaries_of,
)
from mljobs.jobs._targets import count_up_to, limit_time, target_jobs, target_names, why_read_only
from mljobs.jobs._words import Pattern as FilterPattern
from mljobs.jobs._words import Term as FilterTerm
from mljobs.jobs._workers import WorkerInfo, WorkerState, workers

__all__ = [
    "DEFAULT_LEASE",
    "FILTERS",
    "Action",
    "Batch",
    "Bind",
    "Claim",
    "Counts",
    "Cursor",
    "Durations",
    "Filter",
    "FilterPattern",
    "FilterTerm",
    "Filters",
    "Finished",
    "Holder",
    "JobRef",
    "JobSummary",
    "KindDurations",
    "KindStats",
    "Model",
    "Outcome",
    "Page",
    "Pruned",
    "Queue",
    "QueueDepth",
    "Reason",
    "Reasons",
    "Renewal",
    "Report",
    "Rescue",
    "Spread",
    "Stats",
    "SummaryPage",
    "Where",
    "WorkerInfo",
    "WorkerState",
    "affected",
    "best",
    "cancel",
    "cancel_batch",
    "chain",
    "chains",
    "claim",
    "claim_one",
    "complete",
    "complete_many",
    "conditions",
    "count_up_to",
    "counts",
    "cursor_of",
    "durations",
    "fail",
    "fail_many",
    "failure_reasons",
    "find",
    "find_id",
    "finish_and_claim",
    "finish_many",
    "finished_per",
    "get",
    "held_after_end",
    "held_in_queue",
    "history",
    "holders",
    "last_failures",
    "limit_time",
    "lineage",
    "look",
    "next_claims",
    "pattern_of",
    "prunable",
    "prune",
    "prune_batch",
    "queue_depths",
    "release",
    "renew",
    "report",
    "report_many",
    "requeue",
    "requeue_many",
    "rescue",
    "retry",
    "retry_batch",
    "running_jobs",
    "set_progress",
    "set_progress_many",
    "stats",
    "submit",
    "submit_many",
    "summaries",
    "summaries_of",
    "table_of",
    "target_jobs",
    "target_names",
    "usual_durations",
    "why_read_only",
    "workers",
]

accept_any_session(globals(), __all__)
