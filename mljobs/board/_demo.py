"""``mljobs board --demo``: a believable history of some weeks. The failures are real: the code below is run, and fails."""

from __future__ import annotations

import linecache
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from mljobs._values import to_millis, utc_now
from mljobs.record._models import MlJob
from mljobs.states import MlJobKind, MlJobStatus
from mljobs.store._recording import failure_text
from mljobs.store._store import JobStore

JOBS = 5_000
_WEEKS = 6
SEED = 20_261
_QUICK = 500
_T, _B, _R, _D = MlJobKind.TRAIN, MlJobKind.BACKFILL, MlJobKind.FEATURE_REFRESH, MlJobKind.DRIFT_COMPUTE
_WORKERS = [f"gpu-a1-{number}" for number in (2228, 2230, 2231, 2234)] + [
    "gpu-b2-0417",
    "cpu-c1-0093",
    "cpu-c1-0094",
    "cpu-c2-0007",
]


@dataclass(frozen=True, slots=True)
class Work:
    """What is done again and again.

    Attributes:
        usual: Seconds that it takes.
        share: How often it is done, beside the others.
        ceiling: Of its metric; 0 for none.
    """

    kind: MlJobKind
    target: str
    usual: float
    share: float
    ceiling: float = 0.0
    fails: float = 0.035


WORKS = [
    Work(_T, "spam_classifier", 2_000, 0.9, 0.9405, 0.09),
    Work(_T, "fraud_gbm", 3_300, 0.8, 0.871, 0.07),
    Work(_T, "churn_xgb", 1_500, 0.8, 0.823),
    Work(_T, "ranker_lambdamart", 2_700, 0.7, 0.612),
    Work(_T, "embeddings_v2", 4_900, 0.5, 0.774, 0.06),
    Work(_T, "spam_multilingual", 4_100, 0.5, 0.902),
    Work(_T, "ltv_regressor", 900, 0.8, 0.684),
    Work(_B, "clickstream_2025", 9_600, 2),
    Work(_B, "user_events", 5_600, 3),
    Work(_R, "user_features_daily", 420, 14),
    Work(_R, "merchant_graph", 1_250, 8),
    Work(_R, "session_windows", 310, 16),
    Work(_D, "spam_classifier", 120, 12),
    Work(_D, "fraud_gbm", 95, 11),
    Work(_D, "churn_xgb", 60, 9),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- failures

_SOURCE = """\
import json, math, socket, statistics
from concurrent.futures import ThreadPoolExecutor

def load(run):
    with open(run["data"]) as lines:
        return [json.loads(line) for line in lines]

def fit(run, rows):
    lr, loss = run["lr"], 1.0
    for epoch in range(run["epochs"]):
        loss = step(loss, lr, rows)
        if math.isnan(loss):
            raise FloatingPointError(f"loss is nan at epoch {epoch + 1}")
    return loss

def step(loss, lr, rows):
    return loss - lr * statistics.fmean(row["x"] for row in rows) if rows else loss * math.inf * 0

def train(run):
    rows = load(run) if "data" in run else run["rows"]
    return {"loss": fit(run, rows)}

def embed(run):
    return bytearray(run["rows"] * run["width"] * 8)

def refresh(run):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(connect, run["host"], run["port"]).result()

def connect(host, port):
    with socket.create_connection((host, port), timeout=1) as found:
        return found

def parse(run):
    return json.loads(run["manifest"])
"""
_FAILING: list[tuple[str, dict[str, Any]]] = [
    ("train", {"data": "/data/spam/2026-11-19/part-0007.ndjson"}),
    ("train", {"rows": [], "lr": 0.3, "epochs": 4}),
    ("train", {"rows": [{"x": 1.0}, {"y": 2.0}], "lr": 0.1, "epochs": 2}),
    ("embed", {"rows": 1_250_000_000_000, "width": 768}),
    ("refresh", {"host": "127.0.0.1", "port": 9}),
    ("parse", {"manifest": '{"parts": [1, 2,'}),
]


def failures() -> list[str]:
    """Return how the code above fails, as a worker would record it."""
    path = "app/jobs.py"
    linecache.cache[path] = (len(_SOURCE), None, _SOURCE.splitlines(keepends=True), path)
    code: dict[str, Callable[[Any], Any]] = {}
    exec(compile(_SOURCE, path, "exec"), code)  # noqa: S102 - the constant above
    found = []
    for name, run in _FAILING:
        try:
            code[name](run)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is wanted
            trace = error.__traceback__
            found.append(
                failure_text(error.with_traceback(trace.tb_next if trace else None))
            )  # without this file's own
    del linecache.cache[path]
    return found


_SILENT = "rescued: worker gpu-a1-2228 was silent; attempt 5 of 5"


# ----------------------------------------------------------------------------------------------------------- history


class History:
    """Makes the records of some weeks.

    Args:
        now: When they end.
    """

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.begin = now - timedelta(weeks=_WEEKS)
        self._random = random.Random(SEED)  # noqa: S311 - the same history each time
        self._failures = failures()
        self._params: dict[str, dict[str, Any]] = {}

    def records(self, number: int = JOBS) -> Iterator[MlJob]:
        """Yield about so many finished jobs, with the last hour and the last day well filled."""
        recent, shares = number // 16, [work.share for work in WORKS]
        quick = [work for work in WORKS if work.usual < _QUICK]
        hour = self.now - timedelta(minutes=75)
        moments = [(self._moment(), self._random.choices(WORKS, shares)[0]) for _ in range(number - recent)]
        moments += [
            (self._whole(hour + self._random.random() * timedelta(minutes=74)), self._random.choice(quick))
            for _ in range(recent // 3)
        ]
        day = self.now - timedelta(days=1)
        moments += [
            (self._whole(day + self._random.random() * timedelta(hours=23)), self._random.choice(quick))
            for _ in range(recent)
        ]
        for moment, work in sorted(moments, key=lambda pair: pair[0]):
            yield from self._chain(work, moment)

    @staticmethod
    def _whole(moment: datetime) -> datetime:
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)

    def _moment(self) -> datetime:
        """Return a time of submission: more by day, fewer at week-ends."""
        while True:
            moment = self.begin + self._random.random() * (self.now - self.begin - timedelta(minutes=20))
            busy = 0.35 + 0.65 * max(0.0, math.sin((moment.hour + moment.minute / 60 - 6) / 24 * 2 * math.pi))
            if moment.weekday() >= 5:
                busy *= 0.45
            if self._random.random() < busy:
                return self._whole(moment)

    def _chain(self, work: Work, moment: datetime) -> Iterator[MlJob]:
        retry_of, spec = None, self.spec(work)
        burst = work.target == "fraud_gbm" and 2 < (self.now - moment).total_seconds() / 3600 < 6
        fails = 0.75 if burst else work.fails
        for attempt in range(4):
            status = MlJobStatus.COMPLETED
            if self._random.random() < fails:
                status = MlJobStatus.FAILED
            elif self._random.random() < 0.012:
                status = MlJobStatus.CANCELLED
            job = self._job(work, moment, status, spec, attempt)
            if job.finished_at is None or job.finished_at > self.now:
                return
            job.retry_of = retry_of
            yield job
            if status is not MlJobStatus.FAILED or self._random.random() < 0.35:
                return
            retry_of, fails = job.id, 0.3
            moment = job.finished_at + timedelta(seconds=self._random.choice([2, 30, 600, 3000]))

    def _job(self, work: Work, moment: datetime, status: MlJobStatus, spec: dict[str, Any], attempt: int) -> MlJob:
        rnd = self._random
        wait = rnd.expovariate(1 / 40) + (rnd.expovariate(1 / 900) if work.kind is _T and rnd.random() < 0.4 else 0)
        took = work.usual * rnd.lognormvariate(0, 0.18) * (spec.get("rounds", 300) / 300) ** 0.4
        lost = status is MlJobStatus.FAILED and rnd.random() < 0.12
        if status is not MlJobStatus.COMPLETED:
            took *= rnd.random()
        run_after = moment + timedelta(seconds=600) if attempt and rnd.random() < 0.5 else None
        started = (run_after or moment) + timedelta(seconds=wait)
        finished = started + timedelta(seconds=took)
        error = None
        if status is MlJobStatus.FAILED:
            error = _SILENT if lost else rnd.choice(self._failures)
        return MlJob(
            id=self._id(moment),
            kind=work.kind,
            target_name=work.target,
            spec=spec,
            status=status,
            created_at=moment,
            run_after=run_after,
            started_at=started,
            finished_at=finished,
            progress=100 if status is MlJobStatus.COMPLETED else min(99, int(100 * rnd.random())),
            error_message=error,
            metrics=self.metrics(work, spec, moment) if status is MlJobStatus.COMPLETED else None,
            attempts=5 if lost else 2 if rnd.random() < 0.04 else 1,
            priority=rnd.choice([0, 0, 0, 5, 9]) if work.kind is _T else 0,
            exclusive=work.kind is _T and work.target in ("churn_xgb", "fraud_gbm"),
            worker=rnd.choice(_WORKERS[:5] if work.kind is _T else _WORKERS[5:]),
        )

    def _id(self, moment: datetime) -> UUID:
        bits = self._random.getrandbits
        return UUID(int=to_millis(moment) << 80 | 7 << 76 | bits(12) << 64 | 2 << 62 | bits(62))

    def spec(self, work: Work) -> dict[str, Any]:
        """Return what such a job is to do; of training some parameters differ from those of the run before."""
        rnd = self._random
        if work.kind is not _T:
            return {"batch": rnd.choice([256, 512, 1024]), "since": "2026-10-01"}
        known = self._params.setdefault(
            work.target, {"lr": 0.1, "depth": 6, "rounds": 300, "subsample": 0.8, "l2": 1.0}
        )
        choices: dict[str, list[Any]] = {
            "lr": [0.02, 0.03, 0.05, 0.1, 0.3], "depth": [4, 6, 8, 12], "rounds": [200, 300, 400, 800],
            "subsample": [0.6, 0.8, 1.0], "l2": [0.0, 0.5, 1.0, 5.0],
        }  # fmt: skip
        for name in rnd.sample(list(choices), rnd.choice([0, 1, 1, 2])):
            known[name] = rnd.choice(choices[name])
        spec = {"algorithm": "xgb", "objective": "binary:logistic", "seed": 18_446_744_073_709_551_557, **known}
        if work.target == "embeddings_v2":
            spec |= {
                "optimizer": {"name": "adamw", "weight_decay": 0.01, "betas": [0.9, 0.98]},
                "features": [f"f_{n}" for n in range(214)],
            }
        return spec

    def metrics(self, work: Work, spec: dict[str, Any], moment: datetime) -> dict[str, Any] | None:
        """Return what came out: the better the later, with some luck."""
        rnd = self._random
        if not work.ceiling:
            return (
                {"rows": rnd.randrange(10_000, 2_000_000), "drift": round(rnd.random() * 0.2, 4)}
                if work.kind is _D
                else None
            )
        age = (moment - self.begin) / (self.now - self.begin)
        f1 = (
            work.ceiling
            - 0.075 * math.exp(-3.2 * age)
            - abs(rnd.gauss(0, 0.008))
            - (0.02 if spec.get("lr") == 0.3 else 0)
        )
        return {
            "f1": round(f1, 4),
            "auc": round(min(0.999, f1 + 0.028 + rnd.gauss(0, 0.003)), 4),
            "loss": round(0.32 - 2.1 * (f1 - work.ceiling + 0.09) + abs(rnd.gauss(0, 0.012)), 4),
            "train_rows": rnd.randrange(1_100_000, 1_400_000),
            "per_class": {"pos": {"f1": round(f1 - 0.012, 4)}, "neg": {"f1": round(min(1, f1 + 0.03), 4)}},
        }


def fill(store: JobStore, now: datetime | None = None) -> None:
    """Write the history."""
    store.submit_many(History(now or utc_now()).records())
