"""A real notebook, run by a kernel: what a data scientist sees of jobs."""

from __future__ import annotations

from typing import Any

import pytest

CELLS = (
    """
import threading
from mljobs import JobStore, Worker
store = JobStore({url!r})
ids = store.submit_many([("train", f"m{{n}}<b>", {{"lr": n / 10}}) for n in range(3)], ids=True)
worker = Worker(store)

@worker.handles("train")
def train(run):
    run.report(loss=0.5)
    if run.spec["lr"] == 0.2:
        raise ValueError("too high")
    return {{"f1": run.spec["lr"]}}

work = threading.Thread(target=worker.run, kwargs={{"until_idle": True}})
work.start()
followed = store.follow(ids)
work.join()
""",
    "store.get(ids[0])",
    "store.find(limit=2)",
    "followed",
    "store.close()",
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_shows_progress_outcomes_jobs_and_pages(sqlite_url: str) -> None:
    import nbclient
    import nbformat

    cells = [nbformat.v4.new_code_cell(cell.format(url=sqlite_url) if "{{" in cell else cell) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()

    def html(number: int) -> str:
        (output,) = (found for found in notebook.cells[number].outputs if "data" in found)
        data: dict[str, Any] = output["data"]
        return str(data.get("text/html", data.get("text/plain")))

    outcomes = html(0)
    assert "3 of 3 jobs: 2 completed, 1 failed" in outcomes
    assert "ValueError: too high" in outcomes
    assert "m0&lt;b&gt;" in outcomes
    assert "<progress" not in outcomes  # the table has taken the place of the progress
    assert "metrics_json" in html(1)
    assert html(2).count("<tr>") == 3
    assert "Followed 3 of 3 jobs" in html(3)
