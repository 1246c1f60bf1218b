"""Every operation on jobs, written once, on the caller's own session.

Each function takes the caller's ``Session`` (or a Core ``Connection``) first and is part of its transaction: nothing is
committed here. :class:`mljobs.store.JobStore` and :class:`mljobs.store.AsyncJobStore` are the same operations with an
engine and a transaction of their own.

By the question they answer:

- :mod:`~mljobs.jobs._submitting`: what is to be done (``submit``, ``submit_many``, ``retry``)
- :mod:`~mljobs.jobs._reading`: what is there (``get``, ``find``, ``history``, ``counts``)
- :mod:`~mljobs.jobs._claiming`: who works on what now (``claim``, ``renew``, ``release``, ``set_progress``)
- :mod:`~mljobs.jobs._finishing`: how it ended (``complete``, ``fail``, ``requeue``, ``cancel``)
- :mod:`~mljobs.jobs._exchanging`: both at once, for busy workers (``finish_and_claim``)
- :mod:`~mljobs.jobs._sweeping`: what nobody does any more (``rescue``, ``prune``)

Every write names the state it expects, and a worker's write the lease it holds, in the condition of its own statement.
On PostgreSQL each is one statement, and times come from the database's clock. On SQLite, where one writer works at a
time, each takes the write lock before it reads.
"""

from mljobs.jobs._base import Bind, JobRef, Model, table_of
from mljobs.jobs._claiming import (
    DEFAULT_LEASE,
    Claim,
    Renewal,
    claim,
    claim_one,
    look,
    release,
    renew,
    set_progress,
    set_progress_many,
)
from mljobs.jobs._exchanging import finish_and_claim
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
from mljobs.jobs._reading import (
    FILTERS,
    Counts,
    Page,
    conditions,
    counts,
    find,
    get,
    history,
    lineage,
    named_conditions,
)
from mljobs.jobs._submitting import retry, submit, submit_many
from mljobs.jobs._sweeping import Cursor, Pruned, Rescue, prune, prune_batch, rescue

__all__ = [
    "DEFAULT_LEASE",
    "FILTERS",
    "Bind",
    "Claim",
    "Counts",
    "Cursor",
    "JobRef",
    "Model",
    "Outcome",
    "Page",
    "Pruned",
    "Renewal",
    "Rescue",
    "cancel",
    "claim",
    "claim_one",
    "complete",
    "complete_many",
    "conditions",
    "counts",
    "fail",
    "fail_many",
    "find",
    "finish_and_claim",
    "finish_many",
    "get",
    "history",
    "lineage",
    "look",
    "named_conditions",
    "prune",
    "prune_batch",
    "release",
    "renew",
    "requeue",
    "requeue_many",
    "rescue",
    "retry",
    "set_progress",
    "set_progress_many",
    "submit",
    "submit_many",
    "table_of",
]
