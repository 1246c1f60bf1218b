"""``mljobs board --demo``: workers that go on while one looks; the training of the target ``digits`` is real."""

from __future__ import annotations

import random
import threading
from datetime import timedelta
from typing import Any

from sqlalchemy import update

from mljobs import __version__
from mljobs._values import utc_now
from mljobs.board._demo import SEED, WORKS, History, Work, failures
from mljobs.errors import MlJobsError
from mljobs.jobs import Claim, WorkerInfo, WorkerState
from mljobs.jobs._workers import register_worker, update_worker
from mljobs.record._models import MlJob
from mljobs.states import MlJobKind, MlJobStatus
from mljobs.store._store import JobStore

_T, _B, _R, _D = MlJobKind.TRAIN, MlJobKind.BACKFILL, MlJobKind.FEATURE_REFRESH, MlJobKind.DRIFT_COMPUTE
_SILENT_ONE = "gpu-b2-0419"
_STOPPING, _IDLE, _OWN = "gpu-a1-2234", "gpu-a1-2230", "this-process"
_REGISTERED: dict[str, tuple[MlJobKind, ...]] = {
    _IDLE: (_T,), "gpu-a1-2231": (_T,), _STOPPING: (_T,), "gpu-b2-0417": (_T,), _SILENT_ONE: (_T,),
    "cpu-c1-0093": (_B, _R), "cpu-c1-0094": (_B, _R), "cpu-c2-0007": (_R, _D), "cpu-c2-0008": (_R, _D),
    _OWN: (_T,),
}  # fmt: skip


class Live:
    """Workers that go on while one looks, in threads of this process.

    Args:
        store: Where.
        pace: Seconds between two steps of the simulated workers.
    """

    def __init__(self, store: JobStore, pace: float = 1.0) -> None:
        self._store = store
        self._pace = pace
        self._stop = threading.Event()
        self._random = random.Random(SEED)  # noqa: S311
        self._history = History(utc_now())
        self._held: dict[str, tuple[Claim, Work, float]] = {}
        self._seen: list[WorkerInfo] = []
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._simulate, self._train)]

    def start(self) -> None:
        """Put what runs and waits into the table, then work."""
        self._scene()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop, and wait until it has."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def _scene(self) -> None:
        running = [(WORKS[0], 62, "gpu-a1-2231"), (WORKS[2], 91, "gpu-a1-2231"), (WORKS[3], 47, "gpu-a1-2234"),
                   (WORKS[7], 38, "cpu-c1-0093"), (WORKS[9], 73, "cpu-c1-0094"), (WORKS[10], 29, "cpu-c1-0093"),
                   (WORKS[12], 55, "cpu-c2-0007")]  # fmt: skip
        for work, percent, worker in running:
            self._begin(work, worker, percent, work.usual * percent / 100)
        self._begin(WORKS[4], "gpu-b2-0417", 71, WORKS[4].usual * 3.1)
        self._begin(WORKS[1], _SILENT_ONE, 38, 3_421, silent=True)
        self._register()
        self._by_hand()
        for work, count, priority in (
            (WORKS[2], 1, 9),
            (WORKS[1], 2, 5),
            (WORKS[4], 4, 0),
            (WORKS[10], 11, 0),
            (WORKS[13], 3, 0),
        ):
            for _ in range(count):
                ago = timedelta(seconds=self._random.randrange(30, 4_000))
                self._store.submit(
                    work.kind, work.target, self._history.spec(work), priority=priority, created_at=utc_now() - ago,
                    exclusive=work.target == "churn_xgb",
                )  # fmt: skip
        self._store.submit(_B, "user_events", {"batch": 512}, run_after=timedelta(hours=2))

    def _begin(self, work: Work, worker: str, percent: int, elapsed: float, *, silent: bool = False) -> None:
        created = utc_now() - timedelta(seconds=elapsed + self._random.randrange(5, 200))
        job = self._store.submit(
            work.kind, work.target, self._history.spec(work), created_at=created, exclusive=work.target == "churn_xgb"
        )
        claim = self._store.claim_one(job, worker=worker, lease=0.001 if silent else 60)
        started = utc_now() - timedelta(seconds=elapsed)
        with self._store.connect() as bind:  # past the record, which lets nobody rewrite when a held job was started
            jobs: Any = MlJob.__table__
            bind.execute(update(jobs).where(jobs.c.id == job.id).values(started_at=started, progress=percent))
        if not silent:
            self._held[worker + work.target] = (claim, work, float(percent))

    def _register(self) -> None:
        """Let the workers be seen: one idles, one stops, and one has said nothing for a minute."""
        now = utc_now()
        with self._store.connect() as bind:
            for name, kinds in _REGISTERED.items():
                tokens = tuple(kind.value for kind in kinds)
                made = WorkerInfo(
                    name, name.rpartition("-")[0], self._random.randrange(700, 9_000), tokens, 4, __version__, now, now
                )
                known = register_worker(bind, made)
                if name == _SILENT_ONE:
                    table = MlJob.__workers__
                    bind.execute(
                        table.update().where(table.c.name == name).values(last_seen_at=now - timedelta(seconds=61))
                    )
                else:
                    self._seen.append(known)

    def _by_hand(self) -> None:
        started = utc_now() - timedelta(seconds=6_011)
        self._store.submit(_T, "ltv_regressor", {"algorithm": "ridge"}, status=MlJobStatus.RUNNING, created_at=started,
                           started_at=started, progress=20, attempts=1)  # fmt: skip

    def _simulate(self) -> None:
        while not self._stop.wait(self._pace):
            try:
                self._step()
            except MlJobsError:
                continue

    def _step(self) -> None:
        self._store.renew([claim for claim, _, _ in self._held.values()], lease=60)
        with self._store.connect() as bind:
            for worker in self._seen:
                update_worker(bind, worker, WorkerState.STOPPING if worker.name == _STOPPING else WorkerState.RUNNING)
        for key, (claim, work, before) in list(self._held.items()):
            percent = before + self._pace * 100 / work.usual * (1 if work.usual > 600 else 2)
            self._held[key] = claim, work, percent
            try:
                if percent >= 100:
                    del self._held[key]
                    self._end(claim, work)
                else:
                    self._store.set_progress(claim, int(percent))
            except MlJobsError:
                self._held.pop(key, None)
        if len(self._held) < 9:
            self._take()

    def _end(self, claim: Claim, work: Work) -> None:
        if self._random.random() < 0.08:
            self._store.fail(claim, self._random.choice(failures()))
        else:
            self._store.complete(claim, self._history.metrics(work, claim.job.spec, utc_now()))

    def _take(self) -> None:
        worker = self._random.choice(
            [name for name in _REGISTERED if name not in (_SILENT_ONE, _STOPPING, _IDLE, _OWN)]
        )
        for claim in self._store.claim(worker=worker, kinds=_REGISTERED[worker], limit=1, lease=60):
            known = [work for work in WORKS if (work.kind, work.target) == (claim.job.kind, claim.job.target_name)]
            self._held[str(claim.job_id)] = claim, known[0] if known else WORKS[9], 0.0
        work = self._random.choice([work for work in WORKS if work.usual < 1_000])
        if self._random.random() < 0.5:
            self._store.submit(work.kind, work.target, self._history.spec(work))

    def _train(self) -> None:
        """Train a real classifier again and again, each time with other parameters."""
        try:
            from mljobs.board import _digits  # noqa: PLC0415 - an extra
        except ImportError:
            return
        while not self._stop.is_set():
            job = self._store.submit(_T, _digits.TARGET, _digits.spec(self._random))
            try:
                with self._store.running(job, worker=_OWN) as run:
                    _digits.train(run, self._stop)
            except Exception:  # noqa: BLE001 - recorded with the job, which is what it is for
                self._stop.wait(5)
            self._stop.wait(4)
