"""The board: jobs, where people look.

:func:`create_app` returns an ASGI application to be mounted at any path of a host's, for a ``JobStore`` or an
``AsyncJobStore``. Pages are rendered on the server and work without JavaScript. Without ``authorize`` it is read only.
Needs the extra ``board``: ``pip install 'mljobs[board]'``.

- ``_app``: routes, headers, errors
- ``_access``: who may do what, and what a form must bring
- ``_backend``: the store, awaited; ``_hub``: one look at the database for all viewers; ``_streams``: what changes
- ``_now_page``, ``_jobs_page``, ``_job_page``, ``_targets_page``, ``_target_page``, ``_compare_page``, ``_overview_page``:
  the pages; ``_now``, ``_query``, ``_compared``, ``_workers``, ``_finished``: what they show; ``_actions``: what they change
- ``_html``: anybody's text in a page; ``_format``, ``_charts``, ``_plots``: values and figures as people read them
- ``_api``: the same as JSON; ``_api_requests``, ``_api_records``, ``_api_jobs``, ``_api_figures``, ``_api_files``: its
  parts; ``_openapi``: its description
- ``_demo``, ``_live``: the demonstration
"""

from __future__ import annotations

try:
    import jinja2  # noqa: F401 - is the extra there?
    import starlette  # noqa: F401
except ImportError as error:
    raise ImportError("the board needs the extra: pip install 'mljobs[board]'") from error

from mljobs.board._access import Access
from mljobs.board._app import create_app

__all__ = ["Access", "create_app"]
