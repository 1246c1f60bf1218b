"""The bound: psycopg alone with the very statements that mljobs sends, and nothing around them."""

import sys
import time
from datetime import timedelta
from typing import Any

import psycopg

from benchmarks.lifecycle import COLUMNS, claimed, row, sql, under_leases
from mljobs import JobStore, MlJob
from mljobs.guards._companions import WORKER_LOCK
from mljobs.jobs._claiming import _claim_statement
from mljobs.jobs._exchanging import _statement
from mljobs.jobs._finishing import _FINISH
from mljobs.jobs._submitting import _NOT_DEFAULT, _insertion

action, url, *rest = sys.argv[1:]
store = JobStore(url.replace("postgresql://", "postgresql+psycopg://"))
WANTED = {"worker": "raw", "lease": timedelta(seconds=60), "kind": "train"}


def ended(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    return under_leases(jobs, ends=True, status="completed", error=None, metrics=None)


def drain(connection: psycopg.Connection[Any], limit: int) -> None:
    fused = sql(_statement(MlJob, "kind", limit), store)
    begin = sql(_claim_statement(MlJob, "kind", limit), store)
    held = claimed(connection.execute(begin, {**WANTED, "limit": limit}, prepare=True).fetchall())
    while held:
        given = {**WANTED, "limit": limit, **ended(held)}
        held = claimed(connection.execute(fused, given, prepare=True).fetchall())


def listen(connection: psycopg.Connection[Any]) -> None:
    begin, finish = sql(_claim_statement(MlJob, "kind", 1), store), sql(_FINISH.statement(MlJob), store)
    connection.execute(
        f"SELECT pg_advisory_lock_shared({WORKER_LOCK}, ('ml_jobs'::regclass::oid::bigint & 2147483647)::integer)"
    )
    connection.execute("LISTEN mljobs")
    print("ready", flush=True)
    while True:
        held = claimed(connection.execute(begin, {**WANTED, "limit": 1}, prepare=True).fetchall())
        if held:
            print(time.monotonic(), flush=True)
            connection.execute(finish, ended(held), prepare=True).fetchall()
        else:
            for _ in connection.notifies(timeout=1, stop_after=1):
                pass


def submit(connection: psycopg.Connection[Any]) -> None:
    insertion = sql(_insertion(MlJob, _NOT_DEFAULT), store)
    print("ready", flush=True)
    while sys.stdin.readline():
        began = time.monotonic()
        connection.execute(insertion, dict(zip(COLUMNS, row(), strict=True)), prepare=True)
        print(began, flush=True)


with psycopg.connect(url, autocommit=True) as raw:
    if action == "drain":
        print("ready", flush=True)
        sys.stdin.readline()
        drain(raw, 1 if rest[0] == "single" else 1024)
        print("done", flush=True)
    elif action == "listen":
        listen(raw)
    else:
        submit(raw)
