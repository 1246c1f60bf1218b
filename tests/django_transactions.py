"""Stories of the Django site, each run by ``tests/test_examples_web.py`` in a process that has its settings."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import django
import pytest

warnings.simplefilter("error")
os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
sys.path.insert(0, str(Path.cwd()))
django.setup()

from django.core.management import call_command  # noqa: E402
from django.db import IntegrityError, connection, models, transaction  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import clear_url_caches, path  # noqa: E402
from project import urls  # noqa: E402
from sqlalchemy import select, text  # noqa: E402
from uploads.models import Upload  # noqa: E402

from mljobs import MlJob, TerminalStateError, Worker, jobs, on_finished  # noqa: E402
from mljobs.contrib import django as ours  # noqa: E402
from mljobs.store._run import Run  # noqa: E402

STORIES: list[Callable[[], None]] = []


def story(function: Callable[[], None]) -> Callable[[], None]:
    STORIES.append(function)
    return function


def rows() -> tuple[int, int]:
    with ours.store() as store:
        return Upload.objects.count(), store.counts(exact=True).total()


def add(target: str) -> MlJob:
    with ours.session() as session:
        return jobs.submit(session, "train", target)


@story
def both_orms_commit_together() -> None:
    before = rows()
    with transaction.atomic(), ours.session() as session:
        job = jobs.submit(session, "train", "together")
        Upload.objects.create(path="together", job_id=job.id)
        with ours.store() as outside:
            assert outside.counts(exact=True).total() == before[1]  # not yet
    assert rows() == (before[0] + 1, before[1] + 1)
    assert Upload.objects.get(path="together").job_id == job.id


@story
def both_orms_roll_back_together() -> None:
    before = rows()
    with pytest.raises(RuntimeError), transaction.atomic():
        with ours.session() as session:
            job = jobs.submit(session, "train", "gone")
        Upload.objects.create(path="gone", job_id=job.id)
        raise RuntimeError
    assert rows() == before
    with pytest.raises(RuntimeError), ours.session() as session:
        job = jobs.submit(session, "train", "gone")
        Upload.objects.create(path="gone", job_id=job.id)
        raise RuntimeError
    assert rows() == before


@story
def a_refusal_inside_leaves_djangos_transaction_usable() -> None:
    job = add("refused")
    with ours.store() as store:
        store.cancel(job)
    with transaction.atomic():
        Upload.objects.create(path="before", job_id=job.id)
        with pytest.raises(TerminalStateError), ours.session() as session:
            session.execute(text("UPDATE ml_jobs SET progress = 7"))
        Upload.objects.create(path="after", job_id=job.id)
    assert Upload.objects.filter(path__in=["before", "after"]).count() == 2


@story
def a_session_sees_what_django_has_written_and_the_other_way_round() -> None:
    with transaction.atomic():
        row = Upload.objects.create(path="seen", job_id=uuid4())
        with ours.session() as session:
            found = session.execute(text("SELECT path FROM uploads_upload WHERE id = :id"), {"id": row.pk})
            assert found.scalar_one() == "seen"
            job = jobs.submit(session, "train", "seen", {"lr": 0.1, "name": "é"})
        with connection.cursor() as cursor:
            cursor.execute("SELECT target_name FROM ml_jobs WHERE target_name = %s", ["seen"])
            assert cursor.fetchall() == [("seen",)]
    with ours.session() as session:
        again = session.scalars(select(MlJob).where(MlJob.id == job.id)).one()
        assert (again.spec, again.created_at) == ({"lr": 0.1, "name": "é"}, job.created_at)


@story
def commits_and_rollbacks_of_the_session_end_a_savepoint() -> None:
    before = rows()[1]
    with pytest.raises(RuntimeError), transaction.atomic(), ours.session() as session:
        jobs.submit(session, "train", "x")
        session.commit()
        raise RuntimeError
    assert rows()[1] == before
    with transaction.atomic(), ours.session() as session:
        jobs.submit(session, "train", "dropped")
        session.rollback()
        jobs.submit(session, "train", "kept")
        session.commit()
    assert rows()[1] == before + 1


@story
def every_operation_works_on_djangos_connection() -> None:
    with ours.session() as session:
        jobs.submit_many(session, (("train", f"many-{n}", {"n": n}) for n in range(20)))
    with ours.session() as session:
        claims = jobs.claim(session, worker="w", limit=1000)
        assert len(claims) >= 20
        jobs.set_progress(session, claims[0], 40)
        assert len(jobs.renew(session, claims).held) == len(claims)
        jobs.finish_many(session, [jobs.Outcome.completed(claim, {"f1": 0.5}) for claim in claims])
    with ours.session() as session:
        assert jobs.get(session, claims[0].job_id).metrics == {"f1": 0.5}
        retry = jobs.retry(session, claims[0].job_id, again=True)
        assert jobs.find(session, status="queued", target=retry.target_name)[0].retry_of == claims[0].job_id
        assert jobs.counts(session)["train", "completed"] >= 20
        jobs.cancel(session, retry)
        assert not jobs.rescue(session)
    with ours.connection() as lent:
        assert jobs.cancel(lent, jobs.submit(lent, "train", "core"))


@story
def the_end_of_a_job_is_told_when_django_commits() -> None:
    heard: list[str] = []
    with on_finished(lambda job: heard.append(job.target_name)):
        with transaction.atomic():
            with ours.session() as session:
                jobs.cancel(session, jobs.submit(session, "train", "told"))
            with ours.connection() as lent:
                jobs.cancel(lent, jobs.submit(lent, "train", "told by core"))
            assert heard == []
        assert heard == ["told", "told by core"]
        with transaction.atomic():
            with pytest.raises(RuntimeError), transaction.atomic(), ours.session() as session:
                jobs.cancel(session, jobs.submit(session, "train", "never"))
                session.commit()
                raise RuntimeError
            with ours.session() as session:
                job = jobs.submit(session, "train", "again")
                job.cancel()
        assert heard == ["told", "told by core", "again"]


@story
def what_djangos_own_connection_is_refused_is_a_conflict() -> None:
    with ours.session() as session:
        job = jobs.submit(session, "train", "raw")
        job.cancel()

    def raw(_request: HttpRequest) -> HttpResponse:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE ml_jobs SET progress = 1 WHERE target_name = 'raw'")
        return HttpResponse("lost")

    def other(_request: HttpRequest) -> HttpResponse:
        with connection.cursor() as cursor:
            cursor.execute("SELECT * FROM nowhere")
        return HttpResponse("lost")

    urls.urlpatterns.extend([path("raw", raw), path("other", other)])
    clear_url_caches()
    client = Client(raise_request_exception=False)
    response = client.get("/raw")
    assert (response.status_code, response["content-type"]) == (409, "application/problem+json")
    assert json.loads(response.content)["type"] == "urn:mljobs:terminal-state"
    assert client.get("/other").status_code == 500
    response = client.get(f"/jobs/{uuid4()}")
    assert response.status_code == 404


class Seen(models.Model):
    """What a reader may map by hand."""

    target_name = models.TextField()
    status = models.CharField(max_length=16)
    created_at = models.DateTimeField()
    id = models.UUIDField(primary_key=True)

    class Meta:
        app_label = "uploads"
        managed = False
        db_table = "ml_jobs"

    def __str__(self) -> str:
        return self.target_name


@story
def an_unmanaged_model_reads_the_record_and_cannot_change_a_finished_one() -> None:
    with ours.session() as session:
        job = jobs.submit(session, "train", "unmanaged")
        job.cancel()
    fields = ["id", "target_name", "status"]
    if connection.vendor == "postgresql":  # SQLite keeps times as integers
        fields.append("created_at")
    seen = Seen.objects.only(*fields).get(target_name="unmanaged")
    assert (seen.id, seen.status) == (job.id, "cancelled")
    if connection.vendor == "postgresql":
        assert seen.created_at == job.created_at
    with pytest.raises(IntegrityError, match="terminal state"):
        Seen.objects.filter(pk=job.id).update(status="queued")


@story
def a_foreign_key_holds() -> None:
    if connection.vendor != "postgresql":
        return
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM uploads_upload")
        cursor.execute("ALTER TABLE uploads_upload ADD FOREIGN KEY (job_id) REFERENCES ml_jobs (id)")
    with pytest.raises(IntegrityError):
        Upload.objects.create(path="orphan", job_id=uuid4())
    with ours.session() as session:
        Upload.objects.create(path="child", job_id=jobs.submit(session, "train", "parent").id)


@story
def a_worker_works_on_djangos_database() -> None:
    with ours.store() as store:
        job = store.submit("backfill", "worker", {"n": 2})
        worker = Worker(store, poll=0.05)

        @worker.handles("backfill")
        def backfill(run: Run) -> dict[str, int]:
            return {"uploads": Upload.objects.filter(path="nobody's").count(), "n": run.spec["n"]}

        worker.run(until_idle=True)
        assert store.get(job).metrics == {"uploads": 0, "n": 2}


@story
def requests_in_one_transaction_roll_back_whole() -> None:
    before = rows()

    def view(_request: HttpRequest) -> HttpResponse:
        with ours.session() as session:
            Upload.objects.create(path="x", job_id=jobs.submit(session, "train", "x").id)
        with ours.session() as session:
            done = jobs.submit(session, "train", "x")
            done.cancel()
            done.cancel()
        return HttpResponse("lost")

    urls.urlpatterns.append(path("atomic", view))
    clear_url_caches()
    connection.settings_dict["ATOMIC_REQUESTS"] = True
    try:
        assert Client().get("/atomic").status_code == 409
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    assert rows() == before


@story
def a_database_that_mljobs_does_not_know_is_said_so() -> None:
    from mljobs import InvalidValueError

    vendor = connection.vendor
    connection.vendor = "mysql"
    try:
        for attempt in (ours.database_url, ours.store, lambda: ours.session().__enter__()):
            with pytest.raises(InvalidValueError, match="mysql"):
                attempt()
    finally:
        connection.vendor = vendor


@story
def the_migration_can_be_taken_back() -> None:
    call_command("migrate", "uploads", "zero", verbosity=0)
    assert "ml_jobs" not in connection.introspection.table_names()
    call_command("migrate", verbosity=0)
    assert rows() == (0, 0)


if __name__ == "__main__":
    call_command("migrate", verbosity=0)
    for told in STORIES:
        told()
        print(told.__name__)  # noqa: T201
    connection.close()
