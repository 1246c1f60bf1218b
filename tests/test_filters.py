"""``Filter``: one language for what is meant, read, printed and turned into SQL."""

from __future__ import annotations

import json
import pickle
import random
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey, Numeric, String, create_engine, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from mljobs import Filter, FilterError, InvalidValueError, MlJob, MlJobKind, MlJobMixin, MlJobStatus, jobs
from mljobs.jobs import FilterPattern, FilterTerm
from tests.backends import Backend

OF_EACH_KIND = ["sqlite", "postgresql", "postgresql-asyncpg"]
"""Backends: two databases, blocking and async. Of a filter a driver sees the bound values, and two are one library."""
NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


class Base(DeclarativeBase):
    pass


class Run(MlJobMixin, Base):
    """A host's class, with columns of its own."""

    __tablename__ = "filtered_runs"
    owner: Mapped[str | None] = mapped_column(String(40))
    customer_id: Mapped[int | None]
    cost: Mapped[float | None] = mapped_column(Numeric(10, 2, asdecimal=False))
    urgent: Mapped[bool | None]
    due: Mapped[date | None]
    parent_id: Mapped[UUID | None] = mapped_column(ForeignKey("filtered_runs.id"))


# -------------------------------------------------------------------------------------------------- read and printed

texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)
patterns = st.lists(texts, min_size=1, max_size=3).map(lambda parts: FilterPattern(tuple(parts)))
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(-(10**30), 10**30) | finite
moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(
    lambda at: at.replace(microsecond=at.microsecond // 1000 * 1000, tzinfo=UTC)
)
spans = st.integers(0, 10**14).map(lambda millis: timedelta(milliseconds=millis))
comparisons = st.sampled_from(["<", "<=", ">", ">="])
keys = st.lists(texts, min_size=1, max_size=3).map(tuple)


NO_PATH = st.just(())


def _many(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=3).map(tuple)


def _term(name: Any, operator: Any, values: Any, path: Any = NO_PATH) -> st.SearchStrategy[FilterTerm]:
    return st.builds(FilterTerm, name, operator, values, path)


def _one(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return values.map(lambda value: (value,))


is_one_of = st.just(":")
ids = st.text("0123456789abcdef", min_size=1, max_size=32)
id_patterns = st.builds(
    lambda begin, end: FilterPattern((begin, end) if end else (begin,)), ids, st.text("0123456789abcdef", max_size=8)
)
terms = st.one_of(
    _term(st.just("kind"), is_one_of, _many(st.sampled_from([kind.value for kind in MlJobKind]))),
    _term(st.just("status"), is_one_of, _many(st.sampled_from([status.value for status in MlJobStatus]))),
    _term(st.sampled_from(["target", "worker", "error", "owner"]), is_one_of, _many(patterns)),
    _term(st.sampled_from(["created", "started", "finished", "run_after"]), comparisons, _one(moments | spans)),
    _term(st.sampled_from(["created", "finished"]), is_one_of, _many(st.dates())),
    _term(st.sampled_from(["took", "waited"]), comparisons, _one(spans)),
    _term(st.sampled_from(["progress", "attempts", "priority", "customer_id", "cost"]), comparisons, _one(numbers)),
    _term(st.sampled_from(["exclusive", "urgent"]), is_one_of, _many(st.booleans())),
    _term(st.sampled_from(["retry_of", "parent_id"]), is_one_of, _many(st.uuids())),
    _term(st.just("id"), is_one_of, _many(id_patterns)),
    _term(st.just("due"), comparisons, _one(st.dates())),
    _term(st.sampled_from(["spec", "metrics"]), comparisons, _one(numbers), keys),
    _term(st.sampled_from(["spec", "metrics"]), is_one_of, _many(numbers | patterns | st.booleans() | st.none()), keys),
)
DIALECTS = (sqlite.dialect(), postgresql.psycopg.dialect())
filters = st.lists(terms, max_size=5).map(lambda found: Filter(*found))


@given(filters)
@settings(max_examples=300, deadline=None)
def test_what_a_filter_prints_is_read_back_without_loss_and_its_values_are_bound(filter_: Filter) -> None:
    every_value_but_a_token_is_a_bound_parameter(filter_)
    again = Filter.parse(str(filter_), Run)
    assert again == filter_
    assert [[type(value) for value in term.values] for term in again.terms] == [
        [type(value) for value in term.values] for term in filter_.terms
    ]
    assert str(again) == str(filter_)
    assert pickle.loads(pickle.dumps(filter_)) == filter_
    assert isinstance(filter_.words(), str)


def every_value_but_a_token_is_a_bound_parameter(filter_: Filter) -> None:
    for dialect in DIALECTS:
        for term in filter_.terms:
            (condition,) = Filter(term).conditions(Run, now=NOW)
            compiled = condition.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
            bound = [str(value) for value in compiled.params.values()]
            for value in term.values:
                for part in value.parts if isinstance(value, FilterPattern) else ():
                    if len(part) > 4 and term.name != "id":
                        assert part not in compiled.string or any(part in one for one in bound)


@given(st.text(max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_is_either_read_or_answered_with_the_word_at_fault(text: str) -> None:
    try:
        found = Filter.parse(text, Run)
    except FilterError as error:
        assert text[error.position :].startswith(error.word)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        assert pickle.loads(pickle.dumps(error)).args == error.args  # noqa: PT017
    else:
        assert Filter.parse(str(found), Run) == found


def test_the_words_of_the_language_are_those_of_the_keywords() -> None:
    job_id = UUID("0199f3c2000070008000000000009d4e")
    day = datetime(2026, 11, 1, tzinfo=UTC)
    assert Filter.parse("kind:train status:failed,cancelled target:spam,ham") == Filter(
        kind="train", status=["failed", MlJobStatus.CANCELLED], target=["spam", "ham"]
    )
    assert Filter.parse('target:spam* worker:gpu-* error:"CUDA out of memory"') == Filter(
        target_prefix="spam", worker_prefix="gpu-", error_contains="CUDA out of memory"
    )
    assert Filter.parse("created:<=2h finished:>=2026-11-01 started<2026-11-01") == Filter(
        created_after=timedelta(hours=2), finished_after=day, started_before=day
    )
    assert Filter.parse("spec.lr>0.01 metrics.f1>=0.9 spec.optimizer.name:adam") == Filter(
        spec={"lr": (">", 0.01)}, metrics={"f1": (">=", 0.9)}
    ) & Filter(spec={"optimizer.name": "adam"})
    assert Filter.parse(f"retry_of:{job_id} id:0199f3c2…9d4e") == Filter(retry_of=job_id, id="0199f3c2*9d4e")
    assert Filter.parse("owner:ann customer_id:7 urgent:true", Run) == Filter(owner="ann", customer_id=7, urgent=True)  # type: ignore[call-arg]
    assert Filter.parse("") == Filter.parse("   ") == Filter()
    assert not Filter()
    assert str(Filter(target="50%_*")) == r"target:50%_\*"


@pytest.mark.parametrize(
    ("text", "word", "position", "suggestion"),
    [
        ("kind:train staus:failed", "staus:failed", 11, "status:failed"),
        ("status:faild", "status:faild", 0, "status:failed"),
        ("kind:train status:faild,cancelled", "status:faild,cancelled", 11, "status:failed,cancelled"),
        ("lr>0.01", "lr>0.01", 0, "spec.lr>0.01"),
        ("duration:>2h", "duration:>2h", 0, "took:>2h"),
        ("failed", "failed", 0, "status:failed"),
        ("spam", "spam", 0, "target:spam"),
        ("created:2h", "created:2h", 0, "created:<2h"),
        ("created:yesterday", "created:yesterday", 0, None),
        ("spec.lr>abc", "spec.lr>abc", 0, None),
        ("target>5", "target>5", 0, "target:5"),
        ('error:"CUDA out', 'error:"CUDA out', 0, 'error:"CUDA out"'),
        ("-kind:train", "-kind:train", 0, None),
        ("kind:", "kind:", 0, None),
        ("exclusive:yes", "exclusive:yes", 0, "exclusive:true"),
        ("metrics>1", "metrics>1", 0, "metrics.KEY>1"),
        ("kind.x:train", "kind.x:train", 0, None),
        ("id:xyz", "id:xyz", 0, None),
        ("retry_of:9d4e", "retry_of:9d4e", 0, None),
        ("progress>lots", "progress>lots", 0, None),
        ("target:a\x00b", "target:a\x00b", 0, None),
        ("created:>0000-01-01", "created:>0000-01-01", 0, None),
    ],
)
def test_a_word_that_is_not_understood_is_pointed_at(
    text: str, word: str, position: int, suggestion: str | None
) -> None:
    with pytest.raises(FilterError) as caught:
        Filter.parse(text)
    error = caught.value
    assert (error.word, error.position, error.suggestion) == (word, position, suggestion)
    assert isinstance(error, InvalidValueError)
    assert error.field == "filter"
    if suggestion is not None:
        assert error.repaired == text.replace(word, suggestion)
        if "KEY" not in suggestion:
            Filter.parse(error.repaired)


def test_an_error_lists_what_there_is() -> None:
    with pytest.raises(FilterError, match=r"there are queued, running, completed, failed, cancelled") as caught:
        Filter.parse("status:done")
    assert caught.value.known == tuple(MlJobStatus)
    with pytest.raises(FilterError, match=r"target, worker") as caught:
        Filter.parse("foo:bar")
    assert {"kind", "spec", "metrics"} < set(caught.value.known)
    understood, problems = Filter.read("kind:train foo:bar status:failed nope")
    assert understood == Filter(kind="train", status="failed")
    assert [problem.word for problem in problems] == ["foo:bar", "nope"]


def test_a_filter_is_terms_that_can_be_taken_away_and_words_that_can_be_said() -> None:
    found = Filter.parse('kind:train,backfill status:failed target:spam* created:<2h spec.lr>0.01 error:"x y"')
    assert [term.text for term in found.terms] == [
        "kind:train,backfill", "status:failed", "target:spam*", "created:<2h", "spec.lr>0.01", 'error:"x y"'
    ]  # fmt: skip
    assert str(found.without(found.terms[1])) == 'kind:train,backfill target:spam* created:<2h spec.lr>0.01 error:"x y"'
    assert found.words() == (
        "jobs, of kind train or backfill, that are failed, on target beginning with spam, created less than 2h ago, "
        'with spec.lr above 0.01, whose error contains "x y"'
    )
    assert Filter().words() == "all jobs"
    assert Filter.parse("status:failed").words() == "jobs that are failed"
    assert hash(found) == hash(Filter.parse(str(found)))


@pytest.mark.parametrize("model", [MlJob, Run])
def test_each_field_has_an_example_and_a_sentence(model: Any) -> None:
    for field in Filter.fields(model):
        assert field.help.endswith(".")
        if "ID" not in field.example and "VALUE" not in field.example:
            Filter.parse(field.example, model)
    assert ("owner" in {field.name for field in Filter.fields(model)}) == (model is Run)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"kind": 5}, "kind"),
        ({"status": "done"}, "status"),
        ({"created_after": NOW.replace(tzinfo=None)}, "created_after"),
        ({"finished_before": timedelta(hours=-1)}, "finished_before"),
        ({"target": "a\x00"}, "target"),
        ({"spec": {"x": ("!=", 1)}}, "spec.x"),
        ({"spec": {"x": (">", "1")}}, "spec.x"),
        ({"metrics": {"x": float("nan")}}, "metrics.x"),
        ({"id": "zz"}, "id"),
    ],
)
def test_a_keyword_of_another_type_is_refused(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Filter(**fields)
    assert caught.value.field == name


# --------------------------------------------------------------------------------------------------------- found


def _fill(session: Session) -> list[MlJob]:
    specs: list[Any] = [
        {"lr": 0.1, "name": "adam", "deep": {"layers": [1, 2.5], "on": True}, "seed": 2**53 + 1},
        {"lr": 0.001, "name": "sgd*", "deep": {"layers": ["x"], "on": False}, "a.b": 3},
        {"lr": "0.1", "name": None, "deep": "flat"},
        {"lr": 1, "name": 'a"b', "deep": {}},
        [1, 2],
        "text",
    ]
    made = []
    for number, spec in enumerate(specs):
        at = NOW - timedelta(hours=number)
        job = MlJob(
            kind="train" if number % 2 else "backfill", target_name=["spam", "Spam", "spa%", "s*m", "ham", ""][number],
            spec=spec, created_at=at, status="failed" if number < 3 else "queued", priority=number,
            started_at=at + timedelta(minutes=1) if number < 3 else None,
            finished_at=at + timedelta(minutes=1 + 30 * number) if number < 3 else None,
            error_message=["CUDA out of Memory", "50% of /tmp_x", "x"][number] if number < 3 else None,
            metrics={"f1": 0.5 + number / 10, "val/loss": number} if number < 3 else None,
        )  # fmt: skip
        session.add(job)
        made.append(job)
    session.flush()
    return made


FOUND = {
    "": "012345",
    "kind:train": "135",
    "kind:,": "",
    "status:failed,running": "012",
    "target:spam": "0",
    "target:spam,ham": "04",
    "target:s*": "023",
    "target:*m": "0134",
    "target:S*": "1",
    "target:spa%": "2",
    r"target:s\*m": "3",
    'target:""': "5",
    'error:"cuda*memory"': "0",
    "error:/tmp_": "1",
    "error:50%,cuda": "01",
    "created:>2026-11-26T10:00Z": "01",
    "created:>=2026-11-26T10:00Z": "012",
    "created:2026-11-26": "012345",
    "created:2026-11-25": "",
    "finished:>2026-11-26T11:10Z": "01",
    "finished:<2026-11-26T12:30Z": "012",
    "took:>=30m": "12",
    "took:<30m": "0",
    "waited:1m": "012",
    "priority>3": "45",
    "priority:0,5": "05",
    "attempts:0": "012345",
    "exclusive:true": "",
    "progress:0": "012345",
    "spec.lr>0.01": "03",
    "spec.lr:0.1": "0",
    'spec.lr:"0.1"': "2",
    "spec.lr:1": "3",
    "spec.name:adam": "0",
    r"spec.name:sgd\*": "1",
    "spec.name:s*": "1",
    "spec.name:null": "2",
    r"spec.name:a\"b": "3",
    "spec.name:*": "013",
    "spec.deep.on:true": "0",
    "spec.deep.on:false": "1",
    "spec.deep.layers.1>2": "0",
    "spec.deep.layers.0:x,1": "01",
    "spec.seed:9007199254740993": "0",
    "spec.seed:9007199254740992": "",
    'spec."a.b":3': "1",
    "spec.a.b:3": "",
    "spec.0:1": "4",
    "metrics.f1>=0.6": "12",
    "metrics.val/loss<1": "0",
    "spec.lr>0.01 kind:backfill": "0",
}


@pytest.mark.parametrize("backend", OF_EACH_KIND, indirect=True)
def test_each_word_finds_the_same_on_every_database_by_every_way_in(backend: Backend) -> None:
    made: list[MlJob] = []

    def act(session: Session) -> None:
        made.extend(_fill(session))
        session.flush()
        names = {job.id: str(number) for number, job in enumerate(made)}
        for text, wanted in FOUND.items():
            filter_ = Filter.parse(text)
            where = filter_.conditions(now=NOW + timedelta(minutes=1))
            by_sql = session.scalars(select(MlJob.id).where(*where))
            assert "".join(sorted(names[one] for one in by_sql)) == wanted, text
            page = jobs.find(session, filter_)
            assert "".join(sorted(names[job.id] for job in page)) == wanted, text
            assert page.complete, text
            assert jobs.counts(session, text).total() == len(wanted), text
            assert jobs.find(session, text, scan=True).jobs == page.jobs
        whole, part = made[0].id.hex, made[1].id.hex
        for text, found in ((whole, "0"), (whole[:31], "0"), (f"*{part[-6:]}", "1"), (f"{part[:8]}…{part[-6:]}", "1")):
            assert "".join(names[job.id] for job in jobs.find(session, f"id:{text}")) in (found, "012345"), text

    backend.run(act)


def test_what_is_long_ago_is_counted_from_now(store: Any) -> None:
    store.submit("train", "spam")
    assert len(store.find("created:<2h")) == 1
    assert len(store.find("created:>2h")) == 0
    assert len(store.find("created:<2000000d")) == 1


def test_expressions_of_ones_own_stand_beside_a_filter(store: Any) -> None:
    for number in range(4):
        store.submit("train", f"t{number}", priority=number)
    where = MlJob.priority > 1
    assert {job.target_name for job in store.find("kind:train", where=where)} == {"t2", "t3"}
    assert {job.target_name for job in store.find(where=[where, MlJob.priority < 3], kind="train")} == {"t2"}
    assert store.counts(where=where).total() == 2
    with pytest.raises(InvalidValueError, match="expected SQLAlchemy expressions"):
        store.find(where=["priority > 1"])


def test_columns_of_a_host_are_fields_too(empty_url: str) -> None:
    engine = create_engine(empty_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        first = Run(
            kind="train", target_name="a", owner="ann", customer_id=1, cost=1.5, urgent=True, due=date(2026, 11, 1)
        )
        session.add(first)
        session.flush()
        session.add(
            Run(kind="train", target_name="b", owner="bob", customer_id=2, cost=9.25, urgent=False, parent_id=first.id)
        )
        session.flush()
        for text, wanted in {
            "owner:ann": "a", "owner:b*": "b", "customer_id>1": "b", "customer_id:1,2": "ab", "cost<2": "a",
            "urgent:true": "a",
            "due:2026-11-01": "a", "due<2026-12-01": "a", f"parent_id:{first.id}": "b", "owner:ann kind:train": "a",
        }.items():  # fmt: skip
            assert "".join(sorted(job.target_name for job in jobs.find(session, text, model=Run))) == wanted, text
            assert jobs.counts(session, text, model=Run).total() == len(wanted)
        assert [job.target_name for job in jobs.find(session, model=Run, owner="bob", customer_id=2)] == ["b"]  # type: ignore[call-arg]
        with pytest.raises(FilterError, match="there is no field 'owner'"):
            jobs.find(session, "owner:ann")
        with pytest.raises(InvalidValueError, match="no such filter"):
            jobs.find(session, owner="ann")  # type: ignore[call-arg]
    engine.dispose()


# ---------------------------------------------------------------------------------------------------- how far it looks


def test_what_no_index_serves_is_looked_for_so_far_and_the_page_says_how_far(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mljobs.jobs import _paging

    monkeypatch.setattr(_paging, "WINDOWS", (2, 3))
    for number in range(12):
        store.submit("train", f"t{number}", {"n": number})
    rare = Filter(spec={"n": 3})
    page = store.find(rare)
    assert (list(page), page.complete, page.scanned) == ([], False, 5)
    seen, pages = [], 0
    while True:
        seen += [job.target_name for job in page]
        pages += 1
        if page.cursor is None:
            break
        page = store.find(rare, after=page.cursor)
    assert (seen, pages, page.complete) == (["t3"], 3, True)
    whole = store.find(rare, scan=True)
    assert ([job.target_name for job in whole], whole.complete, whole.scanned) == (["t3"], True, None)
    some = store.find("spec.n<9", limit=2)
    assert ([job.target_name for job in some], some.complete) == (["t8", "t7"], True)
    rest = store.find("spec.n<9", limit=2, after=some.cursor, order="newest")
    assert [job.target_name for job in rest] == ["t6", "t5"]
    old = store.find("spec.n>8", order="oldest", limit=2)
    assert ([job.target_name for job in old], old.complete) == ([], False)
    assert [job.target_name for job in store.find("target:t1,t2 spec.n<9")] == ["t2", "t1"]
    counted = store.counts(rare)
    assert (counted.total(), counted.complete, counted.scanned, counted.exact) == (0, False, 5, False)
    assert store.counts(rare, exact=True).total() == 1


@pytest.mark.parametrize("backend", OF_EACH_KIND, indirect=True)
def test_pages_of_a_filter_meet_without_gap_or_overlap(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mljobs.jobs import _paging

    for seed in range(6):
        dice = random.Random(seed)
        monkeypatch.setattr(_paging, "WINDOWS", (dice.randint(1, 4), dice.randint(1, 9)))
        target = f"run{seed}"
        store.submit_many([("train", target, {"n": dice.randint(0, 4)}) for _ in range(30)])
        for order in ("newest", "oldest"):
            wanted = [job.id for job in store.find(target=target, order=order, limit=100) if job.spec["n"] == 2]
            seen: list[UUID] = []
            cursor = None
            while True:
                page = store.find(f"target:{target} spec.n:2", order=order, limit=dice.randint(1, 3), after=cursor)
                seen += [job.id for job in page]
                cursor = page.cursor
                if cursor is None:
                    break
            assert seen == wanted


_ALTERNATIVES = (
    *("kind:train", "kind:train,backfill", "status:failed,cancelled", "target:t0,t2 status:failed,cancelled"),
    *("kind:train,backfill status:failed", "kind:train status:completed", "target:t*", "target:t1 kind:train"),
    *("kind:backfill status:queued", "kind:train target:t0,t1", "finished:>2020-01-01 kind:train"),
    "status:failed,cancelled finished:>2020-01-01",
)


def test_alternatives_with_indexes_of_their_own_are_merged_in_order(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(7)
    with Session(engine) as session:
        for number in range(40):
            status, moment = (
                dice.choice(("queued", "completed", "failed", "cancelled")),
                NOW + timedelta(seconds=number),
            )
            ended = None if status == "queued" else moment
            made = {"kind": dice.choice(("train", "backfill", "drift_compute")), "target_name": f"t{number % 3}"}
            created = NOW + timedelta(seconds=dice.randint(0, 9))
            session.add(MlJob(**made, status=status, created_at=created, started_at=ended, finished_at=ended))
        session.commit()
        everything = jobs.find(session, limit=100).jobs
        for text in _ALTERNATIVES:
            named = {term.name: set(map(_as_text, term.values)) for term in Filter.parse(text).terms}
            wanted = [
                job.id
                for job in everything
                if job.kind in named.get("kind", {job.kind})
                and job.status in named.get("status", {job.status})
                and {"t*", job.target_name} & named.get("target", {"t*"})
                and ("finished" not in named or job.finished_at is not None)
            ]
            for few in (0, 10_000):
                monkeypatch.setattr("mljobs.jobs._paging._FEW", few)
                seen, page = [], jobs.find(session, text, limit=7)
                seen += [job.id for job in page]
                while page.cursor is not None:
                    page = jobs.find(session, text, limit=7, after=page.cursor)
                    seen += [job.id for job in page]
                assert seen == wanted, text
            assert jobs.counts(session, text).total() == len(wanted), text
            assert jobs.count_up_to(session, 5, text) == min(5, len(wanted)), text


def _as_text(value: Any) -> str:
    return "*".join(value.parts) if isinstance(value, FilterPattern) else str(value)


def test_counts_of_kinds_and_states_come_from_the_counters_and_print_without_zeros(store: Any) -> None:
    store.submit_many([("train", "t", {}) for _ in range(3)] + [("backfill", "b", {})])
    store.fail(store.claim(worker="w", kinds=["train"], limit=1)[0], "x")
    assert str(store.counts()) == "train: queued 2, failed 1\nbackfill: queued 1"
    assert str(store.counts("kind:backfill")) == "backfill: queued 1"
    assert store.counts(kind="train", status="queued").total() == 2
    assert store.counts(Filter(kind="train"), kind="backfill").total() == 0
    assert str(store.counts(kind=[])) == "no jobs"
    with pytest.raises(InvalidValueError):
        store.counts(kind="fit")


def test_a_watch_and_an_export_take_a_filter_and_expressions(store: Any, tmp_path: Any) -> None:
    first = store.submit("train", "spam", {"n": 1})
    store.submit("train", "ham", {"n": 2})
    path = tmp_path / "jobs.ndjson"
    for number, options in enumerate(
        [{"filter": "spec.n:1"}, {"where": MlJob.target_name == "spam"}, {"target": "spam"}]
    ):
        assert store.export_jobs(str(path), **options) == 1, number
        assert json.loads(path.read_text())["id"] == first.id.hex
    kept: dict[str, Any] = {}
    assert store.dump_kv(kept, filter="target:s*") == 1
    assert store.to_arrow(filter="spec.n>1", columns=["target_name"]).to_pydict() == {"target_name": ["ham"]}
