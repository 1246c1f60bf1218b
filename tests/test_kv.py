"""Key-value stores: mappings of every make, Redis by pipelines, and the table as a mapping."""

from __future__ import annotations

import dbm.dumb
import json
import shelve
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import diskcache
import pytest
import redis
from redis import asyncio as async_redis
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import (
    AsyncJobStore,
    InvalidTransitionError,
    InvalidValueError,
    JobDecodeError,
    JobExistsError,
    JobHeldError,
    JobMapping,
    JobStore,
    MlJob,
    MlJobStatus,
    TerminalStateError,
    dump_kv,
    load_kv,
)
from mljobs.transfer import _mapping as mapping_module
from mljobs.transfer import _redis as redis_module
from tests import redis_server
from tests.backends import Backend
from tests.cases import case
from tests.host_application import HostBase, TrainingRun
from tests.leases import expire_leases
from tests.transfer_jobs import NOW, empty, job, put, queued, stored

PREFIX = "red.ml.jobs."


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server.server() as url:
        yield url


@pytest.fixture(params=["texts", "bytes"])
def client(redis_url: str, request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=request.param == "texts") as made:
        made.flushall()
        yield made


# ------------------------------------------------------------------------------------------------------- mappings


def test_a_dump_and_a_load_keep_every_byte(backend: Backend, store: Any) -> None:
    jobs = [job(target_name="\N{SNOWMAN}"), queued(), job(status="failed", error_message="x\n")]
    put(backend, *jobs)
    before = stored(backend)
    for prefix in ("", PREFIX, "jobs/*[?]\\:"):
        with case(prefix):
            mapping: dict[str, str] = {"other": "is left alone"}
            assert store.dump_kv(mapping, prefix) == 3
            assert mapping == {"other": "is left alone"} | {prefix + one.id.hex: one.to_json() for one in jobs}
            del mapping["other"]
            empty(backend)
            assert store.load_kv(mapping, prefix=prefix).inserted == 3
            assert stored(backend) == before
            assert store.load_kv(mapping, prefix).skipped == 3


def test_extended_and_filtered_like_an_export(backend: Backend, store: Any) -> None:
    one = queued(priority=4, run_after=NOW)
    put(backend, one, job())
    mapping: dict[str, str] = {}
    seen: list[Any] = []
    assert store.dump_kv(mapping, extended=True, status="queued", progress=seen.append) == 1
    assert json.loads(mapping[one.id.hex])["priority"] == 4
    assert [each.records for each in seen] == [1]
    empty(backend)
    assert store.load_kv(mapping, progress=seen.append).inserted == 1
    assert (store.get(one.id).priority, store.get(one.id).run_after) == (4, NOW)
    with pytest.raises(InvalidValueError, match="no such filter"):
        store.dump_kv(mapping, limit=3)


@pytest.mark.parametrize("make", ["shelve", "dbm", "cache", "index"])
def test_stores_on_disk_work(sqlite_url: str, make: str) -> None:
    opened: Any = {
        "shelve": lambda: shelve.open("kv"),  # noqa: SIM115 - closed below
        "dbm": lambda: dbm.dumb.open("kv", "c"),  # noqa: SIM115
        "cache": lambda: diskcache.Cache("kv"),
        "index": lambda: diskcache.Index("kv"),
    }[make]()
    jobs = [job(target_name="\N{SNOWMAN}"), queued()]
    with JobStore(sqlite_url) as store:
        with Session(store.engine, expire_on_commit=False) as session, session.begin():
            session.add_all(jobs)
        assert store.dump_kv(opened, PREFIX) == 2
        assert store.load_kv(opened, PREFIX).skipped == 2
    empty_engine = create_engine("sqlite:///other.db", poolclass=NullPool)
    MlJob.metadata.create_all(empty_engine)
    with JobStore(empty_engine) as store:
        assert store.load_kv(opened, PREFIX).inserted == 2
        assert {one.to_json() for one in store.find()} == {one.to_json() for one in jobs}
    (opened.cache if make == "index" else opened).close()


def test_a_load_obeys_the_rules_of_an_import(backend: Backend, store: Any) -> None:
    finished, live, held = job(), queued(), store.submit("train", "held")
    store.claim_one(held.id, worker="anna")
    put(backend, finished, live)
    changes = [
        job(id=finished.id, progress=3),
        queued(id=live.id, status="running", started_at=NOW, progress=9),
        job(id=held.id),
        job(),
    ]
    mapping = {one.id.hex: one.to_json().encode() for one in changes}
    done = store.load_kv(mapping, on_conflict="update", requeue_running=False)
    assert (done.inserted, done.updated, done.refused) == (1, 1, 2)
    assert {problem.key for problem in done.problems} == {finished.id.hex, held.id.hex}
    with pytest.raises(JobExistsError, match="of key '"):
        store.load_kv({finished.id.hex: finished.to_json()}, on_conflict="error")
    assert store.load_kv(mapping, on_conflict="update", requeue_running=True).updated == 1
    assert store.get(live.id).status is MlJobStatus.QUEUED


def test_what_is_no_record_under_the_prefix_is_rejected_with_its_key(backend: Backend, store: Any) -> None:
    one, other = job(), job()
    mapping: dict[Any, Any] = {
        "p." + one.id.hex.upper(): one.to_json(),
        "p." + other.id.hex: one.to_json(),
        "p." + uuid4().hex: "{",
        "p." + uuid4().hex: "",
        "p." + uuid4().hex: "\ud800",
        "p." + uuid4().hex: 5,
        "p.index": "x",
        "p." + uuid4().hex + "0": one.to_json(),
        "elsewhere": "x",
        17: "x",
    }
    done = store.load_kv(mapping, "p.", rejects="rejects")
    assert (done.inserted, done.rejected, done.total) == (1, 7, 8)
    kept = [json.loads(line) for line in Path("rejects").read_text().splitlines()]
    assert {each["key"] for each in kept} == {key for key in mapping if str(key).startswith("p.")} - {
        "p." + one.id.hex.upper()
    }
    by_key = {each["key"]: each for each in kept}
    assert by_key["p." + other.id.hex]["field"] == "id"
    assert by_key["p.index"]["field"] == "key"
    assert [problem.key for problem in done.problems] == [each["key"] for each in kept]


def test_what_is_no_store_is_refused(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        for wrong in (5, object(), None, [], "text"):
            with pytest.raises(InvalidValueError, match="expected a mapping"):
                store.dump_kv(wrong)
            with pytest.raises(InvalidValueError, match="expected a mapping"):
                store.load_kv(wrong)
        with pytest.raises(InvalidValueError, match="prefix"):
            store.dump_kv({}, prefix=b"x")  # type: ignore[arg-type]


def test_in_a_session_it_is_part_of_the_callers_transaction(backend: Backend) -> None:
    one = job()

    def act(session: Session) -> None:
        assert load_kv(session, {one.id.hex: one.to_json()}).inserted == 1
        mapping: dict[str, str] = {}
        assert dump_kv(session, mapping) == 1
        assert mapping == {one.id.hex: one.to_json()}
        session.rollback()

    backend.run(act)
    assert stored(backend) == {}


# ---------------------------------------------------------------------------------------------------------- Redis


def test_redis_gets_and_gives_every_byte(
    backend: Backend, store: Any, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "_PIPELINE", 40)
    jobs = [job(target_name="\N{SNOWMAN}"), *(queued(target_name=f"t{number}") for number in range(100))]
    put(backend, *jobs)
    before = stored(backend)
    for prefix in ("", PREFIX, "jobs*[?]\\^:"):
        with case(prefix):
            client.flushall()
            assert store.dump_kv(client, prefix) == len(jobs)
            assert client.dbsize() == len(jobs)
            raw: Any = client.get(prefix + jobs[0].id.hex)
            assert (raw.encode() if isinstance(raw, str) else raw) == jobs[0].to_json().encode()
            if prefix:
                client.set("other", "is left alone")
            assert store.load_kv(client, prefix).skipped == len(jobs)
            empty(backend)
            assert store.load_kv(client, prefix).inserted == len(jobs)
            assert stored(backend) == before


@pytest.mark.parametrize("client", ["bytes"], indirect=True)
def test_redis_values_of_another_kind_are_rejected(backend: Backend, store: Any, client: redis.Redis) -> None:
    one, listed = job(), uuid4().hex
    client.set(one.id.hex, one.to_json())
    client.rpush(listed, "x")
    broken = uuid4().hex
    client.set(broken, b"\xff\x00")
    client.set("session:5", b"\xff\x00")
    client.set(b"\xff", "x")
    done = store.load_kv(client)
    assert (done.inserted, done.rejected) == (1, 4)
    reasons = {problem.key: problem.reason for problem in done.problems}
    assert "WRONGTYPE" in reasons[listed]
    assert "not UTF-8" in reasons[broken]
    assert "32 hex digits" in reasons["session:5"]
    assert "32 hex digits" in reasons["\udcff"]
    assert done.rejects is not None
    assert "\\udcff" in {json.loads(line)["key"] for line in done.rejects.read_text().splitlines()}


def test_an_asynchronous_client_works_with_an_async_store(backend: Backend, redis_url: str) -> None:
    jobs = [job(), queued()]
    put(backend, *jobs)
    if not backend.is_async:
        client = async_redis.Redis.from_url(redis_url)
        with JobStore(backend.url) as blocking:
            for act in (blocking.dump_kv, blocking.load_kv):
                with pytest.raises(InvalidValueError, match="needs AsyncJobStore"):
                    act(client, PREFIX)
        return

    async def main() -> None:
        async with async_redis.Redis.from_url(redis_url) as client, AsyncJobStore(backend.url) as store:
            await client.flushall()
            assert await store.dump_kv(client, PREFIX) == 2
            assert (await store.load_kv(client, PREFIX)).skipped == 2
            with pytest.raises(JobExistsError):
                await store.load_kv(client, PREFIX, on_conflict="error")
            empty(backend)
            assert (await store.load_kv(client, PREFIX)).inserted == 2

    backend.wait(main())
    assert stored(backend) == {one.id: one.to_json() for one in jobs}


# ------------------------------------------------------------------------------------------------- the table as one


def test_the_table_is_a_mapping(backend: Backend) -> None:
    jobs = sorted((job(target_name=f"t{number}") for number in range(5)), key=lambda one: one.id)
    put(backend, *jobs)

    def act(session: Session) -> None:
        mapping = JobMapping(session, "p.")
        keys = ["p." + one.id.hex for one in jobs]
        texts = [one.to_json() for one in jobs]
        assert list(mapping) == keys
        assert len(mapping) == 5
        assert list(mapping.values()) == texts
        assert list(mapping.items()) == list(zip(keys, texts, strict=True))
        assert dict(mapping) == dict(zip(keys, texts, strict=True))
        assert mapping[keys[0].upper().replace("P.", "p.")] == texts[0]
        assert keys[0] in mapping
        for missing in (jobs[0].id.hex, "p.x", "p." + uuid4().hex, 5, None):
            assert missing not in mapping
            with pytest.raises(KeyError):
                mapping[missing]  # type: ignore[index]
        assert mapping.get("p." + uuid4().hex) is None
        assert repr(mapping) == "<JobMapping of ml_jobs, prefix 'p.'>"

    backend.run(act)


def test_what_changes_while_the_mapping_is_read_does_not_disturb_it(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping_module, "_PAGE", 2)

    def act(session: Session) -> None:
        mapping = JobMapping(session)
        for number in range(7):
            one = queued(id=number + 1)
            mapping[one.id.hex] = one.to_json()
        seen = []
        for key in mapping:
            seen.append(int(key, 16))
            mapping.pop(key)
        assert seen == [1, 2, 3, 4, 5, 6, 7]
        assert len(mapping) == 0

    backend.run(act)


def test_put_get_delete_list_are_reddbs_contract(backend: Backend) -> None:
    one, two = queued(), job()

    def act(session: Session) -> None:
        mapping = JobMapping(session)
        mapping[one.id.hex] = one.to_json()
        mapping[two.id.hex] = two.to_json().encode()  # type: ignore[assignment]
        assert mapping.get(one.id.hex) == one.to_json()
        assert mapping.get(uuid4().hex) is None
        running = queued(id=one.id, status="running", started_at=NOW, progress=5)
        mapping[one.id.hex] = running.to_json()
        assert dict(mapping.items()) == {one.id.hex: running.to_json(), two.id.hex: two.to_json()}
        assert mapping.pop(uuid4().hex, None) is None
        mapping.pop(one.id.hex, None)
        assert list(mapping) == [two.id.hex]

    backend.run(act)
    assert stored(backend) == {two.id: two.to_json()}


def test_a_finished_key_is_neither_changed_nor_deleted(backend: Backend) -> None:
    one = job()
    put(backend, one)
    key = one.id.hex

    def act(session: Session) -> None:
        mapping = JobMapping(session)
        mapping[key] = one.to_json()
        mapping[key] = " " + one.to_json()  # the same record
        other = job(id=one.id, progress=5, metrics_json=None)
        with pytest.raises(TerminalStateError) as caught:
            mapping[key] = other.to_json()
        assert caught.value.job_id == one.id
        assert caught.value.status is MlJobStatus.COMPLETED
        assert caught.value.changes == {"progress": (100, 5), "metrics_json": ('{"f1": 0.9}', None)}
        with pytest.raises(TerminalStateError, match="cannot be deleted"):
            del mapping[key]
        for remove in (mapping.popitem, mapping.clear):
            with pytest.raises(TerminalStateError):
                remove()
        assert mapping[key] == one.to_json()

    backend.run(act)
    assert stored(backend) == {one.id: one.to_json()}


def test_a_live_key_moves_along_legal_edges_and_is_its_workers_while_held(backend: Backend, store: Any) -> None:
    free, held = queued(), store.submit("train", "held")
    put(backend, free)
    store.claim_one(held.id, worker="anna")

    def act(session: Session) -> None:
        mapping = JobMapping(session)
        with pytest.raises(InvalidTransitionError) as caught:
            mapping[free.id.hex] = job(id=free.id).to_json()
        assert (caught.value.status, caught.value.wanted) == (MlJobStatus.QUEUED, MlJobStatus.COMPLETED)
        with pytest.raises(JobHeldError, match="is held by worker 'anna' until") as refused:
            mapping[held.id.hex] = job(id=held.id).to_json()
        assert (refused.value.job_id, refused.value.worker) == (held.id, "anna")
        with pytest.raises(JobHeldError):
            del mapping[held.id.hex]
        mapping[free.id.hex] = job(id=free.id, status="cancelled").to_json()
        with pytest.raises(KeyError):
            del mapping[uuid4().hex]
        with pytest.raises(KeyError):
            del mapping["x"]

    backend.run(act)
    expire_leases(backend.outside)
    store.rescue()
    backend.run(lambda session: JobMapping(session).pop(held.id.hex))
    assert stored(backend).keys() == {free.id}


def test_a_key_or_text_that_does_not_fit_is_named(backend: Backend) -> None:
    one = job()

    def act(session: Session) -> None:
        mapping = JobMapping(session, "p.")
        for key in ("p." + uuid4().hex, one.id.hex, "p.5", "p.{" + one.id.hex + "}"):
            with pytest.raises(InvalidValueError) as caught:
                mapping[key] = one.to_json()
            assert (caught.value.field, caught.value.value) == ("key", key)
        with pytest.raises(JobDecodeError) as refused:
            mapping["p." + one.id.hex] = one.to_json().replace("train", "fit")
        assert refused.value.field == "kind"
        for text in ("{", b"\xff", "\ud800", "", 5):
            with pytest.raises(JobDecodeError):
                mapping["p." + one.id.hex] = text  # type: ignore[assignment]
        assert len(mapping) == 0

    backend.run(act)
    with pytest.raises(InvalidValueError, match="prefix"):
        backend.run(lambda session: JobMapping(session, 5))  # type: ignore[arg-type]


def test_a_dump_into_another_table_is_guarded_too(backend: Backend, store: Any) -> None:
    one, two = job(), queued()
    put(backend, one, two)
    other = create_engine("sqlite:///other.db", poolclass=NullPool)
    MlJob.metadata.create_all(other)
    with Session(other) as session, session.begin():
        mapping = JobMapping(session, PREFIX)
        assert store.dump_kv(mapping, PREFIX) == 2
        assert store.dump_kv(mapping, PREFIX) == 2
        assert store.load_kv(mapping, PREFIX).skipped == 2
    with Session(other) as session, session.begin():
        assert {UUID(hex=key): text for key, text in JobMapping(session).items()} == stored(backend)


def test_a_connection_and_a_hosts_own_class_will_do(empty_url: str) -> None:
    engine = create_engine(empty_url, poolclass=NullPool)
    HostBase.metadata.create_all(engine)
    one, two = queued(), job()
    with engine.begin() as connection:
        mapping = JobMapping(connection, model=TrainingRun)
        for each in (one, two):
            mapping[each.id.hex] = each.to_json()
        mapping[one.id.hex] = queued(id=one.id, target_name="new").to_json()
        assert len(mapping) == 2
        del mapping[one.id.hex]
        with pytest.raises(TerminalStateError):
            del mapping[two.id.hex]
    with Session(engine) as session:
        assert session.get_one(TrainingRun, two.id).flavour == "run"
    engine.dispose()
