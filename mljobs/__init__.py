"""mljobs: the table of machine-learning jobs. A job that has finished never changes again.

The public names load on first use, so importing a leaf (Alembic's plugin, say) does not load the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mljobs._lazy import lazy_names

if TYPE_CHECKING:
    from mljobs.errors import (
        AmbiguousIdError,
        FilterError,
        GiveUp,
        InvalidTransitionError,
        InvalidValueError,
        JobCancelled,
        JobDecodeError,
        JobExistsError,
        JobHeldError,
        JobNotFound,
        LeaseLostError,
        MlJobsError,
        ModelError,
        SchemaError,
        StartRefusedError,
        TargetLockedError,
        TerminalStateError,
        TransferError,
        WaitTimeout,
    )
    from mljobs.events import on_finished
    from mljobs.jobs import Claim, Filter, Outcome
    from mljobs.record._columns import kind_column
    from mljobs.record._dataclass import MlJobDataclassMixin
    from mljobs.record._mixin import MlJobMixin
    from mljobs.record._models import Base, MlJob, MlJobLease, metadata
    from mljobs.record._sql import time_bucket
    from mljobs.states import MlJobKind, MlJobStatus
    from mljobs.store._async_store import AsyncJobStore
    from mljobs.store._outcomes import Followed
    from mljobs.store._run import Run
    from mljobs.store._store import JobStore
    from mljobs.transfer import Compared, Imported, JobMapping, compare, dump_kv, export_jobs, import_jobs, load_kv
    from mljobs.worker import Tally, Worker, exponential

__version__ = "0.1.0"

__all__ = [
    "AmbiguousIdError",
    "AsyncJobStore",
    "Base",
    "Claim",
    "Compared",
    "Filter",
    "FilterError",
    "Followed",
    "GiveUp",
    "Imported",
    "InvalidTransitionError",
    "InvalidValueError",
    "JobCancelled",
    "JobDecodeError",
    "JobExistsError",
    "JobHeldError",
    "JobMapping",
    "JobNotFound",
    "JobStore",
    "LeaseLostError",
    "MlJob",
    "MlJobDataclassMixin",
    "MlJobKind",
    "MlJobLease",
    "MlJobMixin",
    "MlJobStatus",
    "MlJobsError",
    "ModelError",
    "Outcome",
    "Run",
    "SchemaError",
    "StartRefusedError",
    "Tally",
    "TargetLockedError",
    "TerminalStateError",
    "TransferError",
    "WaitTimeout",
    "Worker",
    "compare",
    "dump_kv",
    "exponential",
    "export_jobs",
    "import_jobs",
    "kind_column",
    "load_kv",
    "metadata",
    "on_finished",
    "time_bucket",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    __all__,
    "errors",
    {
        "events": ("on_finished",),
        "jobs": ("Claim", "Filter", "Outcome"),
        "store._outcomes": ("Followed",),
        "store._run": ("Run",),
        "record._columns": ("kind_column",),
        "record._dataclass": ("MlJobDataclassMixin",),
        "record._mixin": ("MlJobMixin",),
        "record._models": ("Base", "MlJob", "MlJobLease", "metadata"),
        "record._sql": ("time_bucket",),
        "states": ("MlJobKind", "MlJobStatus"),
        "store._async_store": ("AsyncJobStore",),
        "store._store": ("JobStore",),
        "transfer": (
            "Compared",
            "Imported",
            "JobMapping",
            "compare",
            "dump_kv",
            "export_jobs",
            "import_jobs",
            "load_kv",
        ),
        "worker": ("Tally", "Worker", "exponential"),
    },
)
