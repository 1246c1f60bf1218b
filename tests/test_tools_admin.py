"""Admin interfaces show the table as it is, edit live jobs, and say in the page why a finished one stays as it is."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
from jinja2 import Environment
from jinja2.bccache import Bucket, BytecodeCache
from sqladmin import Admin as SqlAdmin
from sqladmin import ModelView as SqlAdminView
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session
from starlette.applications import Starlette
from starlette_admin.contrib.sqla import Admin as StarletteAdmin
from starlette_admin.contrib.sqla import ModelView

from mljobs import MlJob, MlJobLease, MlJobMixin, MlJobStatus
from mljobs.contrib.starlette_admin import JobView
from tests.backends import Backend

Client = httpx.AsyncClient


class _CompiledOnce(BytecodeCache):
    """The templates of an admin interface, for all that are made here: each has an environment of its own."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._kept:
            bucket.bytecode_from_string(self._kept[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._kept[bucket.key] = bucket.bytecode_to_string()


_TEMPLATES = _CompiledOnce()


def _keep_templates(admin: SqlAdmin | StarletteAdmin) -> None:
    environment: Environment = admin.templates.env
    environment.bytecode_cache, environment.auto_reload = _TEMPLATES, False


def _visit(app: Starlette, story: Callable[[Client], Coroutine[Any, Any, None]]) -> Coroutine[Any, Any, None]:
    async def run() -> None:
        # As a server would: an error becomes a 500, which the stories do not expect.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://host", follow_redirects=True) as client:
            await story(client)

    return run()


def _fields(page: str) -> dict[str, str]:
    """Return what a browser would send of the form on a page."""
    found: dict[str, str] = {}
    for tag in re.findall(r"<input[^>]*>", page):
        name, value = re.search(r'name="(\w+)"', tag), re.search(r'value="([^"]*)"', tag)
        if name and 'type="submit"' not in tag and ("checkbox" not in tag or "checked" in tag):
            found[name[1]] = html.unescape(value[1]) if value else ""
    for name, text in re.findall(r'<textarea[^>]*name="(\w+)"[^>]*>\r?\n?(.*?)</textarea>', page, re.DOTALL):
        found[name] = html.unescape(text)
    for name, options in re.findall(r'<select[^>]*name="(\w+)"[^>]*>(.*?)</select>', page, re.DOTALL):
        chosen = re.search(r'<option[^>]*value="([^"]*)"[^>]*selected', options)
        found[name] = chosen[1] if chosen else ""
    return found


def _as_sent(form: dict[str, str]) -> dict[str, str]:
    """Return the fields with the line ends that browsers send."""
    return {name: re.sub(r"\r?\n", "\r\n", value) for name, value in form.items()}


def _jobs(session: Session) -> tuple[MlJob, MlJob]:
    """Add a finished job and a queued one that retries it."""
    finished = MlJob(kind="train", target_name="spam", spec={"lr": 0.1})
    finished.start()
    finished.complete({"f1": 0.5})
    queued = MlJob(kind="train", target_name="ham", retry_of=finished.id)
    session.add_all([finished, queued])
    session.commit()
    return finished, queued


def _loaded(engine: Engine, job_id: object) -> MlJob:
    with Session(engine) as session:
        return session.get_one(MlJob, job_id)


def _said(response: httpx.Response) -> str:
    return html.unescape(response.text)


# ------------------------------------------------------------------------------------------------------------ sqladmin


class JobAdmin(SqlAdminView, model=MlJob):
    column_list = "__all__"


class LeaseAdmin(SqlAdminView, model=MlJobLease):
    column_list = "__all__"


def test_sqladmin_lists_shows_edits_and_shows_why_a_finished_job_stays(backend: Backend) -> None:
    finished, queued = backend.run(lambda session: tuple(job.id for job in _jobs(session)))
    app = Starlette()
    admin = SqlAdmin(app, backend.engine)
    _keep_templates(admin)
    admin.add_view(JobAdmin)
    admin.add_view(LeaseAdmin)

    async def story(client: Client) -> None:
        page = await client.get("/admin/ml-job/list")
        for shown in (str(finished), "spam", "completed", "100"):
            assert shown in page.text
        assert (await client.get("/admin/ml-job-lease/list")).status_code == 200
        assert '{"lr":0.1}' in _said(await client.get(f"/admin/ml-job/details/{finished}"))
        assert str(finished) in (await client.get("/admin/ml-job/export/csv")).text
        assert (await client.get("/admin/ml-job/export/json")).json()[0]["status"] == "completed"

        edit = f"/admin/ml-job/edit/{finished}"
        form = _fields((await client.get(edit)).text)
        assert (form["status"], form["progress"]) == ("completed", "100")
        refused = await client.post(edit, data={**form, "progress": "50"})
        assert refused.status_code == 400
        assert f"job {finished} is completed (since " in _said(refused)
        assert "progress 100 -> 50" in _said(refused)
        assert "datetime.datetime" not in _said(refused)

        edit = f"/admin/ml-job/edit/{queued}"
        form = _fields((await client.get(edit)).text)
        assert form["retry_of"] == str(finished)
        assert (await client.post(edit, data={**form, "priority": "7"})).status_code == 200
        wrong = await client.post(edit, data={**form, "status": "done"})
        assert wrong.status_code == 400
        assert "field 'status' cannot be 'done': expected one of queued, running" in _said(wrong)
        wrong = await client.post(edit, data={**form, "spec_json": "{"})
        assert "field 'spec_json' cannot be '{': not JSON text" in _said(wrong)

        gone = await client.delete(f"/admin/ml-job/delete?pks={finished}")
        assert "is completed" in _said(await client.get(gone.text))
        new = {"kind": "backfill", "target_name": "new", "spec_json": "{}"}
        assert (await client.post("/admin/ml-job/create", data=new)).status_code == 200

    if isinstance(backend.engine, AsyncEngine):
        backend.wait(_visit(app, story))
    else:
        asyncio.run(_visit(app, story))
    assert _loaded(backend.outside, finished).progress == 100
    assert _loaded(backend.outside, queued).priority == 7
    with Session(backend.outside) as session:
        (created,) = session.query(MlJob).filter_by(target_name="new")
        assert (created.status, created.kind) == (MlJobStatus.QUEUED, "backfill")


class AdminBase(DeclarativeBase):
    """Of a host."""


class Fit(MlJobMixin, AdminBase):
    """A job in the host's own table."""

    __tablename__ = "fits"

    owner: Mapped[str | None]


class FitAdmin(SqlAdminView, model=Fit):
    form_excluded_columns = ("created_at", "started_at", "finished_at", "run_after", "error_message")


class OwnersAdmin(SqlAdminView, model=Fit):
    form_columns = ("owner",)


def test_sqladmin_saves_the_hosts_own_columns_of_a_finished_job(engine: Engine) -> None:
    AdminBase.metadata.create_all(engine)
    with Session(engine) as session:
        fit = Fit(kind="train", target_name="spam", spec={"lr": 0.1})
        fit.start()
        fit.fail("boom\nat line 3")
        session.add(fit)
        session.commit()
        before = fit.to_json()
    for view in (FitAdmin, OwnersAdmin):
        app = Starlette()
        admin = SqlAdmin(app, engine)
        _keep_templates(admin)
        admin.add_view(view)

        async def story(client: Client, owner: str = view.__name__) -> None:
            edit = f"/admin/fit/edit/{fit.id}"
            page = await client.get(edit)
            form = _as_sent(_fields(page.text))
            assert (await client.post(edit, data=form)).status_code == 200
            assert (await client.post(edit, data={**form, "owner": owner})).status_code == 200
            with Session(engine) as session:
                saved = session.get_one(Fit, fit.id)
                assert (saved.owner, saved.to_json()) == (owner, before)

        asyncio.run(_visit(app, story))


# ----------------------------------------------------------------------------------------------------- starlette-admin


def _starlette_admin(engine: Any, *views: ModelView) -> Starlette:
    app = Starlette()
    admin = StarletteAdmin(engine, secret_key="of this test")
    _keep_templates(admin)
    for view in views:
        admin.add_view(view)
    admin.mount_to(app)
    return app


def test_starlette_admin_lists_shows_edits_and_shows_why_a_finished_job_stays(backend: Backend) -> None:
    finished, queued = backend.run(lambda session: tuple(job.id for job in _jobs(session)))
    before = _loaded(backend.outside, queued)
    app = _starlette_admin(backend.engine, JobView(MlJob), ModelView(MlJobLease))

    async def story(client: Client) -> None:
        page = await client.get("/admin/ml-job/list")
        for shown in (str(finished), "spam", "completed"):
            assert shown in page.text
        assert (await client.get("/admin/ml-job-lease/list")).status_code == 200
        assert '{"lr":0.1}' in _said(await client.get(f"/admin/ml-job/detail?pk={finished}"))

        edit = f"/admin/ml-job/edit?pk={finished}"
        form = _fields((await client.get(edit)).text)
        assert (form["status"], form["kind"], form["progress"]) == ("completed", "train", "100")
        refused = await client.post(edit, data={**form, "progress": "50"})
        assert refused.status_code == 422
        assert f"job {finished} is completed (since " in _said(refused)
        assert "progress 100 -> 50" in _said(refused)

        edit = f"/admin/ml-job/edit?pk={queued}"
        form = _fields((await client.get(edit)).text)
        saved = await client.post(edit, data={**form, "priority": "7", "run_after": "2030-01-01T12:00:00"})
        assert saved.status_code == 200
        form = _fields((await client.get(edit)).text)
        wrong = await client.post(edit, data={**form, "spec_json": "{"})
        assert wrong.status_code == 422
        assert "field 'spec_json' cannot be '{': not JSON text" in _said(wrong)

        for field, typed in (("run_after", "tomorrow"), ("progress", "abc"), ("priority", "1e9")):
            wrong = await client.post(edit, data={**form, field: typed})
            assert wrong.status_code == 422
            assert f"field '{field}' cannot be '{typed}'" in _said(wrong)
        names = form.keys() - {"csrftoken", "_continue_editing", "_add_another"}
        for name in names if backend.name == "postgresql" else ():  # SQLite sorts by any column
            sorted_by = await client.get(f"/admin/ml-job/list?sort={name}__asc")
            assert sorted_by.status_code == 200, name
        listed = (await client.get("/admin/ml-job/list")).text
        assert "sort=status__" in listed
        assert "sort=spec_json__" not in listed

        token = {"X-CSRFToken": form["csrftoken"]}
        gone = await client.post(f"/admin/_api/ml-job/row-action?name=delete&pk={finished}", headers=token)
        assert gone.status_code == 400
        assert gone.json()["msg"].startswith(f"job {finished} is completed")
        blank = _fields((await client.get("/admin/ml-job/create")).text)
        new = {**blank, "kind": "backfill", "status": "queued", "target_name": "new", "spec_json": "{}"}
        assert (await client.post("/admin/ml-job/create", data=new)).status_code == 200

    if isinstance(backend.engine, AsyncEngine):
        backend.wait(_visit(app, story))
    else:
        asyncio.run(_visit(app, story))
    assert _loaded(backend.outside, finished).progress == 100
    after = _loaded(backend.outside, queued)
    assert (after.priority, after.created_at, after.retry_of) == (7, before.created_at, finished)
    assert str(after.run_after) == "2030-01-01 12:00:00+00:00"
    with Session(backend.outside) as session:
        assert session.query(MlJob).filter_by(target_name="new").one().status is MlJobStatus.QUEUED


def test_starlette_admin_saves_the_hosts_own_columns_of_a_finished_job(engine: Engine) -> None:
    AdminBase.metadata.create_all(engine)
    with Session(engine) as session:
        fit = Fit(kind="train", target_name="spam", spec_json='{"lr":\n0.1}')
        fit.start()
        fit.fail("boom\nat line 3")
        session.add(fit)
        session.commit()
        before = fit.to_json()

    async def story(client: Client) -> None:
        edit = f"/admin/fit/edit?pk={fit.id}"
        form = _as_sent(_fields((await client.get(edit)).text))
        assert (await client.post(edit, data=form)).status_code == 200
        assert (await client.post(edit, data={**form, "owner": "Ada"})).status_code == 200

    asyncio.run(_visit(_starlette_admin(engine, JobView(Fit)), story))
    with Session(engine) as session:
        saved = session.get_one(Fit, fit.id)
        assert (saved.owner, saved.to_json()) == ("Ada", before)


def test_starlette_admins_own_view_shows_the_table_too(engine: Engine) -> None:
    with Session(engine) as session:
        finished = _jobs(session)[0].id
    app = _starlette_admin(engine, ModelView(MlJob))

    async def story(client: Client) -> None:
        assert str(finished) in (await client.get("/admin/ml-job/list")).text
        assert '{"lr":0.1}' in _said(await client.get(f"/admin/ml-job/detail?pk={finished}"))
        assert "completed" in (await client.get(f"/admin/ml-job/edit?pk={finished}")).text

    asyncio.run(_visit(app, story))
