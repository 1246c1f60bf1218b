"""A process that forks: what its child does with the stores that it inherits."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url

from mljobs import AsyncJobStore, JobStore, jobs
from mljobs.db import _forks
from tests.waiting import until


def _in_child(do: Callable[[], object]) -> int:
    """Fork; return the id of the child, which ends with 0 unless ``do`` raises, or takes long."""
    child = os.fork()
    if child:
        return child
    ended = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        do()
        ended = 0
    finally:
        os._exit(ended)


def _ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def _targets(url: str) -> list[str]:
    with JobStore(url) as store:
        return sorted(job.target_name for job in store.find())


def test_a_fork_waits_until_a_write_to_the_file_has_ended_for_its_lock_would_be_held_in_the_child(
    sqlite_url: str,
) -> None:
    with JobStore(sqlite_url) as store:
        written = threading.Event()

        def write() -> None:
            with store.connect() as connection:
                jobs.submit(connection, "train", "parent")
                written.set()
                until(lambda: _forks.under_way)
            store.submit("train", "parent, after the fork")

        writer = threading.Thread(target=write)
        writer.start()
        written.wait()
        assert _ended_well(_in_child(lambda: store.submit("train", "child")))
        writer.join()
    assert _targets(sqlite_url) == ["child", "parent", "parent, after the fork"]


def test_forks_wait_once_for_a_connection_that_stays_in_use(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_forks, "_PATIENCE", 0.01)
    monkeypatch.setattr(_forks, "_in_vain_until", 0.0)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    with JobStore(sqlite_url) as store, store.engine.connect():
        assert _ended_well(_in_child(lambda: None))
        waited = _forks._in_vain_until
        assert _ended_well(_in_child(lambda: None))
        assert 0 < waited == _forks._in_vain_until
    over.set()
    other.join()


def test_what_a_child_commits_to_the_file_is_not_lost_when_its_parent_closes_the_store(sqlite_url: str) -> None:
    (from_child, to_parent), (from_parent, to_child) = os.pipe(), os.pipe()

    def submit() -> None:
        store.submit("train", "child")
        os.write(to_parent, b"!")
        os.read(from_parent, 1)
        store.submit("train", "child, alone")

    with JobStore(sqlite_url) as store:
        store.submit("train", "parent")
        child = _in_child(submit)
        os.read(from_child, 1)
    os.write(to_child, b"!")
    assert _ended_well(child)
    assert _targets(sqlite_url) == ["child", "child, alone", "parent"]
    for end in (from_child, to_parent, from_parent, to_child):
        os.close(end)


def test_a_child_has_connections_of_its_own_whatever_it_does_first(postgres_url: str, tmp_path: Path) -> None:
    def backend(store: JobStore[Any], *, atomic: bool) -> int:
        with store.connect(atomic=atomic) as connection:
            return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar())  # type: ignore[union-attr, arg-type]

    engine = create_engine(make_url(postgres_url))
    for store in (JobStore(postgres_url), JobStore(engine)):
        with store:
            for atomic in (True, False):
                mine = backend(store, atomic=atomic)
                told = tmp_path / "backend"
                child = _in_child(lambda: told.write_text(str(backend(store, atomic=atomic))))  # noqa: B023
                assert _ended_well(child)
                assert int(told.read_text()) != mine == backend(store, atomic=atomic)
    engine.dispose()


def test_a_child_watches_though_a_thread_of_its_parent_looked_at_the_fork(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        reader = store._reader.get()
        with reader.lock:
            assert _ended_well(_in_child(lambda: list(store.watch(timeout=0))))


def test_a_store_that_is_sent_to_another_process_is_refused_with_what_to_do(sqlite_url: str) -> None:
    for store in (JobStore(sqlite_url), AsyncJobStore(sqlite_url)):
        with pytest.raises(TypeError, match=r"make one in the other process, (Async)?JobStore\(url\)"):
            pickle.dumps(store)
