"""``manage.py test``: our tables are there, for ``migrate`` made them."""

from __future__ import annotations

from django.test import TestCase

from mljobs import JobStore, Run, Worker, jobs
from mljobs.contrib.django import connection, database_url, session
from mljobs.testing import run_jobs
from uploads.models import Upload

worker = Worker(JobStore(database_url()))  # as a module of yours has it, with the handlers


@worker.handles("train")
def train(run: Run) -> dict[str, int]:
    """Train, for these tests."""
    return {"rows": run.spec["rows"]}


class UploadTest(TestCase):
    """Each test is a transaction that Django rolls back, jobs included."""

    def test_an_upload_queues_its_training(self) -> None:
        response = self.client.post(
            "/uploads", {"path": "emails.csv", "spec": {"lr": 0.1}}, content_type="application/json"
        )
        self.assertEqual(response.status_code, 201)
        upload = Upload.objects.get()
        with session() as mljobs_session:
            self.assertEqual(jobs.get(mljobs_session, upload.job_id).spec, {"lr": 0.1})

    def test_what_an_upload_queues_is_trained(self) -> None:
        self.client.post("/uploads", {"path": "emails.csv", "spec": {"rows": 10}}, content_type="application/json")
        with connection() as lent:  # Django's own, in the transaction of this test
            store = JobStore(lent)
            self.assertEqual(run_jobs(store, worker), {"completed": 1})
            self.assertEqual(store.get(Upload.objects.get().job_id).metrics, {"rows": 10})

    def test_a_finished_job_cannot_be_cancelled(self) -> None:
        with session() as mljobs_session:
            job = jobs.submit(mljobs_session, "train", "emails.csv")
            job.cancel()
        response = self.client.post(f"/jobs/{job.id}/cancel")
        self.assertEqual(response.status_code, 409)
        self.assertEqual(response.json()["job_status"], "cancelled")
