"""With Flask-SQLAlchemy."""

from __future__ import annotations

import os
from typing import Any
from uuid import UUID

from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from mljobs import MlJob, jobs, schema
from mljobs.contrib.flask import install
from mljobs.contrib.pydantic import MlJobRead


class Base(DeclarativeBase):
    """Of the application."""


db = SQLAlchemy(model_class=Base)


class Upload(db.Model):  # type: ignore[name-defined,misc]
    """A file that a user sent, and the job that trains on it."""

    __tablename__ = "uploads"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    job_id: Mapped[UUID] = mapped_column(ForeignKey(MlJob.id))
    job: Mapped[MlJob] = relationship(MlJob)


def shown(job: MlJob) -> dict[str, Any]:
    """Return the job as the API shows it."""
    return MlJobRead.model_validate(job).model_dump(mode="json")


def create_app(url: str | None = None) -> Flask:
    """Return the application on a database."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ.get("DATABASE_URL", "sqlite:///app.db")
    db.init_app(app)
    install(app)  # TerminalStateError -> 409, JobNotFound -> 404 ... as problem+json
    with app.app_context():
        schema.upgrade(db.engine)  # or in your deployment: mljobs upgrade --url ...
        db.create_all()  # or Flask-Migrate

    @app.post("/uploads")
    def upload() -> tuple[dict[str, Any], int]:
        body = request.get_json()
        job = MlJob(kind="train", target_name=body["path"], spec=body["spec"])
        row = Upload(path=body["path"], job=job)
        db.session.add(row)
        db.session.commit()  # both or neither
        return {"id": row.id, "path": row.path, "job": shown(row.job)}, 201

    @app.get("/jobs/<uuid:job_id>")
    def read(job_id: UUID) -> dict[str, Any]:
        return shown(jobs.get(db.session(), job_id))

    @app.post("/jobs/<uuid:job_id>/cancel")
    def cancel(job_id: UUID) -> dict[str, Any]:
        job = jobs.get(db.session(), job_id)
        job.cancel()
        db.session.commit()  # in the view: an error in teardown_request has no answer of its own
        return shown(job)

    return app
