"""What others do with a record that has finished: the facts behind ``docs/coming-from.md``, each tried and printed.

Not part of the test suite: it needs ``pip install celery mlflow optuna`` in an environment of its own.
Run ``python -m benchmarks.finished``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text


def celery_says(directory: Path) -> None:
    import celery  # noqa: PLC0415

    app: Any = celery.Celery(broker="memory://", backend=f"db+sqlite:///{directory / 'celery.db'}")
    print(f"celery {celery.__version__}")
    print(f"  an id that nobody ever submitted is {app.AsyncResult('no-such-id').state}")
    app.backend.store_result("a", ValueError("boom"), "FAILURE")
    app.backend.store_result("a", 2, "SUCCESS")
    print(f"  FAILURE, then a late SUCCESS: {app.AsyncResult('a').state}")
    print(f"  task_acks_late={app.conf.task_acks_late} task_track_started={app.conf.task_track_started}", end=" ")
    print(f"result_expires={app.conf.result_expires}")


def mlflow_says(directory: Path) -> None:
    import mlflow  # noqa: PLC0415

    client = mlflow.MlflowClient(f"sqlite:///{directory / 'mlflow.db'}")
    print(f"mlflow {mlflow.__version__}")
    run_id = client.create_run(client.create_experiment("x")).info.run_id
    client.set_terminated(run_id, "FINISHED")
    client.log_metric(run_id, "f1", 0.1)
    client.update_run(run_id, status="RUNNING")
    run = client.get_run(run_id)
    print(f"  FINISHED, then a metric and a status: {run.info.status} {run.data.metrics}")
    code = f"import mlflow, os; mlflow.set_tracking_uri({f'sqlite:///{directory}/mlflow.db'!r}); "
    code += "print(mlflow.start_run().info.run_id, flush=True); os._exit(9)"
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    print(f"  a run whose process died: {client.get_run(died.stdout.split()[-1]).info.status}")


def optuna_says(directory: Path) -> None:
    import optuna  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{directory / 'optuna.db'}"
    storage = optuna.storages.RDBStorage(url)
    study = optuna.create_study(storage=storage, study_name="x")
    print(f"optuna {optuna.__version__}")
    trial = study.ask()
    study.tell(trial, 1.0)
    try:
        storage.set_trial_user_attr(trial._trial_id, "late", 1)
    except optuna.exceptions.UpdateFinishedTrialError as error:
        print(f"  COMPLETE, then a write by its own API: {type(error).__name__}")
    with create_engine(url).begin() as connection:
        connection.execute(text("UPDATE trials SET state = 'RUNNING'"))
    (trial,) = optuna.load_study(study_name="x", storage=url).trials
    print(f"  COMPLETE, then an UPDATE by SQL: {trial.state.name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for say in (celery_says, mlflow_says, optuna_says):
            say(Path(name))
