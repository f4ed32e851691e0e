"""Environments of their own: what is in the shipped one, and a training task in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mlflow import MlflowClient

from stack.airflow import Airflow
from tests.support import StackUnderTest, dag_file

DAG_ID = "uses_environment"
WORKER = "airflow-worker"
FOLDER = "/opt/environments/xgboost"
VERSION = "3.2.0"


def test_it_has_what_it_asks_for_and_nothing_of_airflows(stack: StackUnderTest) -> None:
    """What the image has in the same version is the image's, by a link that leads somewhere."""
    code = (
        "import mlflow, numpy, os, xgboost, importlib.metadata as metadata\n"
        "names = {one.metadata['Name'].lower() for one in metadata.distributions()}\n"
        "assert {'xgboost-cpu', 'mlflow-skinny', 'numpy'} <= names, names\n"
        "assert not [name for name in names if 'airflow' in name or name == 'celery'], names\n"
        "assert os.path.realpath(numpy.__file__).startswith('/opt/venv/'), numpy.__file__\n"
        "assert os.path.realpath(xgboost.__file__).startswith('/opt/environments/'), xgboost.__file__\n"
    )
    told = stack.exec(WORKER, f"{FOLDER}/bin/python", "-c", code)
    assert told.code == 0, told.output
    assert stack.exec(WORKER, "find", FOLDER, "-xtype", "l").output == ""


def test_it_takes_little_room(stack: StackUnderTest) -> None:
    """MiB of its own: the library of 22 MiB, and not what it shares with the image."""
    size = int(stack.exec(WORKER, "du", "--summarize", "--block-size=1M", "/opt/environments").output.split()[0])
    assert 10 < size < 50


def test_the_image_itself_has_another_version(stack: StackUnderTest) -> None:
    told = stack.exec(WORKER, "python3", "-c", "import xgboost; print(xgboost.__version__)")
    assert told.output.splitlines()[-1] not in ("", VERSION), told.output


@pytest.fixture(scope="module")
def trained(stack: StackUnderTest, airflow: Airflow) -> Iterator[dict[str, Any]]:
    """A run of the DAG that has ended well, and what its task in the environment returned."""
    with dag_file(stack, "tests/e2e/environment_dags.py"):
        airflow.wait_for_dag(DAG_ID)
        airflow.set_paused(DAG_ID, False)
        run_id = airflow.trigger(DAG_ID)
        state = airflow.follow(DAG_ID, run_id, patience=180)
        assert state == "success", airflow.task_log(DAG_ID, run_id, "train")
        yield {
            **airflow.xcom(DAG_ID, run_id, "train"),
            "outside": airflow.xcom(DAG_ID, run_id, "outside"),
            "log": airflow.task_log(DAG_ID, run_id, "train"),
        }


def test_a_task_runs_in_it(trained: dict[str, Any]) -> None:
    """With the data from S3; the task beside it runs in the image's own environment."""
    assert trained["prefix"] == FOLDER
    assert trained["version"] == VERSION
    assert trained["rows"] == 569
    assert not trained["airflow"]
    assert trained["outside"] not in ("", VERSION)
    assert "Traceback" not in trained["log"], trained["log"]


def test_its_results_are_in_mlflow(tracking: MlflowClient, trained: dict[str, Any]) -> None:
    run = tracking.get_run(trained["run_id"])
    assert run.data.params == {"n_estimators": "20", "max_depth": "3"}
    assert run.data.metrics["accuracy"] > 0.9
    flavours = tracking.get_logged_model(trained["model_uri"].rpartition("/")[2])
    assert flavours.source_run_id == trained["run_id"]
