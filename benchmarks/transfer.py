"""How fast records move, each next to the bound that the same run measures: ``python -m benchmarks.transfer``.

Records are those of ``benchmarks.codec``, of about 660 bytes a line. Parts by name: lines, export, import, objects, memory.

- export: against binary COPY out, parsed into rows of the cheapest values (16 bytes, int8, text), and against the same
  with ``UUID`` and ``datetime`` objects.
- import: a file into the empty table, against binary COPY of ready rows into the same table with the same indexes.
- lines: a file on disk to rows, against RedDB's Rust decoder as it is known, and msgspec's bare decoding. In processor
  time, for nothing waits here and the machine may have other work; so are the objects.
- objects: what ``to_json`` and ``from_json`` of an ORM object cost, and the object by itself.
- memory: the peak of a process that imports and exports ``BENCH_RECORDS`` (default 5,000,000) records.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from sqlalchemy import make_url

from benchmarks.bench import clear, compare, database, rate, report
from benchmarks.codec import Bare, sample
from mljobs import JobStore, MlJob, MlJobKind
from mljobs.db._wire import _WIRES
from mljobs.record._kv import decode, encode
from mljobs.transfer._files import reading
from mljobs.transfer._lines import batches
from mljobs.transfer._rows import NAMES, SHARED, row_maker

RECORDS = int(float(os.environ.get("BENCH_SCALE", "1")) * 200_000)
MANY = int(os.environ.get("BENCH_RECORDS", "5000000"))
WIRE_TYPES = [
    "int8", "text", "int8", "bytea", "text", "text", "int2", "text", "int8", "text", "text",
    "int2", "bool", "int2", "bytea", "int8", "text",
]  # fmt: skip
NATIVE_TYPES = [
    "timestamptz", "text", "timestamptz", "uuid", "text", "text", "int2", "text", "timestamptz", "text", "text",
    "int2", "bool", "int2", "uuid", "timestamptz", "text",
]  # fmt: skip
REDDB_DECODES = 230_000
BARE_THEN = 1_340_000


def write_lines(path: Path, number: int) -> None:
    with path.open("wb") as file:
        for at in range(number):
            file.write(encode(sample(at)).encode() + b"\n")


def rows_of(path: Path, keep: list[Any] | None = None) -> int:
    """Make rows of a file's lines, in the batches of an import."""
    make = row_maker(_WIRES["psycopg"], MlJobKind)
    total = 0
    with reading(path) as source:
        for batch in batches(source.read, lambda *_: None):
            total += len(batch.lines)
            if keep is not None:
                keep += map(make, batch.lines)
            else:
                deque(map(make, batch.lines), 0)
    return total


def cpu_rate(number: int, act: Callable[[], object]) -> float:
    """Return how many a second of processor time, when ``act`` does ``number``."""
    start = time.process_time()
    act()
    return number / (time.process_time() - start)


def connect(url: str) -> psycopg.Connection[Any]:
    return psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(False))


def lines(work: Path) -> None:
    path = work / "jobs.ndjson"
    write_lines(path, RECORDS)
    bare = msgspec.json.Decoder(Bare).decode
    few = path.read_bytes().splitlines()[:2000]

    def bound() -> None:
        for _ in range(RECORDS // len(few)):
            for line in few:
                bare(line)

    def in_memory() -> None:
        make = row_maker(_WIRES["psycopg"], MlJobKind)
        for _ in range(RECORDS // len(few)):
            for line in few:
                make(line)

    rates = compare(
        {
            "bound: msgspec, bare struct, warm": lambda: cpu_rate(RECORDS, bound),
            "lines in memory to rows": lambda: cpu_rate(RECORDS, in_memory),
            "lines of a file to rows": lambda: cpu_rate(RECORDS, lambda: rows_of(path)),
        }
    )
    report("lines to rows, without ORM objects", rates)
    print(f"  RedDB's Rust, as known: {REDDB_DECODES:,}/s while the bound made {BARE_THEN:,}/s on this machine")
    for name in ("lines in memory to rows", "lines of a file to rows"):
        against = sorted(found / REDDB_DECODES for found in rates[name])
        print(f"  {name}, against it: {against[len(against) // 2]:.2f} ({against[0]:.2f} .. {against[-1]:.2f})")
    print(f"  so twice as fast is a ratio of {2 * REDDB_DECODES / BARE_THEN:.2f} to the bound")


def export(url: str, work: Path) -> None:
    path = work / "jobs.ndjson"
    write_lines(path, RECORDS)
    clear(url)
    with JobStore(url) as store, connect(url) as raw:
        store.import_jobs(path)
        clear_statistics(url)

        def bound(types: list[str]) -> None:
            text = f"COPY (SELECT {', '.join(NAMES[:SHARED])} FROM ml_jobs) TO STDOUT (FORMAT binary)"
            with raw.cursor() as cursor, cursor.copy(text) as copy:
                copy.set_types(types[:SHARED])
                for _ in copy.rows():
                    pass

        rates = compare(
            {
                "bound: COPY out, cheapest rows": lambda: rate(RECORDS, lambda: bound(WIRE_TYPES)),
                "bound: COPY out, UUID and datetime": lambda: rate(RECORDS, lambda: bound(NATIVE_TYPES)),
                "store.export_jobs": lambda: rate(RECORDS, lambda: store.export_jobs(path)),
                "export_jobs, extended": lambda: rate(RECORDS, lambda: store.export_jobs(path, extended=True)),
                "export_jobs, .zst": lambda: rate(RECORDS, lambda: store.export_jobs(work / "jobs.zst")),
                "export_jobs, .gz": lambda: rate(RECORDS, lambda: store.export_jobs(work / "jobs.gz")),
            }
        )
    report(f"export of {RECORDS:,} records", rates, 0.7)


def clear_statistics(url: str) -> None:
    with connect(url) as raw:
        raw.autocommit = True
        raw.execute("VACUUM ANALYZE ml_jobs")


def import_(url: str, work: Path) -> None:
    path = work / "jobs.ndjson"
    write_lines(path, RECORDS)
    ready: list[Any] = []
    rows_of(path, ready)
    with JobStore(url) as store, connect(url) as raw:

        def bound() -> float:
            clear(url)

            def act() -> None:
                with raw.cursor() as cursor:
                    with cursor.copy(f"COPY ml_jobs ({', '.join(NAMES)}) FROM STDIN (FORMAT binary)") as copy:
                        copy.set_types(WIRE_TYPES)
                        for row in ready:
                            copy.write_row(row)
                    raw.commit()

            return rate(RECORDS, act)

        def ours() -> float:
            clear(url)
            return rate(RECORDS, lambda: store.import_jobs(path))

        def again() -> float:
            return rate(RECORDS, lambda: store.import_jobs(path))

        rates = compare(
            {
                "bound: binary COPY of ready rows": bound,
                "store.import_jobs, empty table": ours,
                "import_jobs, all there": again,
                "import_jobs update, all equal": lambda: rate(
                    RECORDS, lambda: store.import_jobs(path, on_conflict="update")
                ),
            }
        )
    report(f"import of {RECORDS:,} records", rates, 0.5)


def objects() -> None:
    number = 20_000
    records = [sample(at) for at in range(1000)]
    texts = [encode(record) for record in records]
    jobs = [MlJob.from_json(text) for text in texts]
    rounds = number // len(records)
    new_instance = MlJob.__mapper__.class_manager.new_instance
    values = [vars(job) for job in jobs]
    values = [{key: value for key, value in each.items() if key != "_sa_instance_state"} for each in values]

    def empty_objects() -> None:
        for _ in range(rounds):
            for each in values:
                job: Any = new_instance()
                job.__dict__.update(each)

    def constructed() -> None:
        for _ in range(rounds):
            for each in values:
                MlJob(**each)

    def attributes() -> None:
        for _ in range(rounds):
            for job in jobs:
                _ = (
                    job.created_at, job.error_message, job.finished_at, job.id, job.kind, job.metrics_json, job.progress,
                    job.spec_json, job.started_at, job.status, job.target_name,
                )  # fmt: skip

    def each_of(items: list[Any], act: Any) -> Any:
        def run() -> None:
            for _ in range(rounds):
                for item in items:
                    act(item)

        return run

    def to_json_of(job: MlJob) -> str:
        return job.to_json()

    report(
        "to_json: the codec, the attributes, both",
        compare(
            {
                "bound: codec.encode of a record": lambda: cpu_rate(number, each_of(records, encode)),
                "eleven attributes of an object": lambda: cpu_rate(number, attributes),
                "MlJob.to_json": lambda: cpu_rate(number, each_of(jobs, to_json_of)),
            }
        ),
    )
    report(
        "from_json: the codec, the object, both",
        compare(
            {
                "bound: codec.decode to a record": lambda: cpu_rate(number, each_of(texts, decode)),
                "an object with its state, no more": lambda: cpu_rate(number, empty_objects),
                "MlJob(...) of ready values": lambda: cpu_rate(number, constructed),
                "MlJob.from_json": lambda: cpu_rate(number, each_of(texts, MlJob.from_json)),
            }
        ),
    )


def memory(url: str, work: Path) -> None:
    """Each transfer in a process of its own, whose peak the system tells."""
    for number in (MANY // 10, MANY):
        path = work / "many.ndjson"
        write_lines(path, number)
        clear(url)
        for act in ("import", "export"):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.transfer", "--peak", act, url, str(path)],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds = time.perf_counter() - start
            print(f"  {act:<7} {number:>10,} records: {done.stdout.strip()}, {number / seconds:,.0f}/s", flush=True)


def peak(act: str, url: str, path: str) -> None:
    with JobStore(url) as store:
        if act == "import":
            done: Any = store.import_jobs(path)
        else:
            done = store.export_jobs(path)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak {size:.0f} MB ({done})")


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
        return
    chosen = sys.argv[1:] or ["lines", "export", "import", "objects"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if "lines" in chosen:
            lines(work)
        if "objects" in chosen:
            objects()
        if {"export", "import", "memory"} & set(chosen):
            with database() as url:
                if "export" in chosen:
                    export(url, work)
                if "import" in chosen:
                    import_(url, work)
                if "memory" in chosen:
                    memory(url, work)


if __name__ == "__main__":
    main()
