"""One transaction of Django's for both ORMs."""

from __future__ import annotations

import json
from uuid import UUID

from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_GET, require_POST

from mljobs import MlJob, jobs
from mljobs.contrib.django import session
from mljobs.contrib.pydantic import MlJobRead
from uploads.models import Upload


def shown(job: MlJob) -> dict[str, object]:
    """Return the job as the API shows it."""
    return MlJobRead.model_validate(job).model_dump(mode="json")


@require_POST
def upload(request: HttpRequest) -> JsonResponse:
    """Keep the file and queue its training: both or neither."""
    body = json.loads(request.body)
    with session() as mljobs_session:  # a transaction.atomic block of Django's
        job = jobs.submit(mljobs_session, "train", body["path"], body["spec"])
        row = Upload.objects.create(path=body["path"], job_id=job.id)
    return JsonResponse({"id": row.pk, "path": row.path, "job": shown(job)}, status=201)


@require_GET
def read(_request: HttpRequest, job_id: UUID) -> JsonResponse:
    """Return the job; JobNotFound is a 404."""
    with session() as mljobs_session:
        return JsonResponse(shown(jobs.get(mljobs_session, job_id)))


@require_POST
def cancel(_request: HttpRequest, job_id: UUID) -> JsonResponse:
    """Cancel the job; TerminalStateError is a 409."""
    with session() as mljobs_session:
        job = jobs.get(mljobs_session, job_id)
        job.cancel()
    return JsonResponse(shown(job))
