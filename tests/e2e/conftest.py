"""A run of the shipped pipeline, which the tests of this folder look at, and MLflow's client to look with."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from stack.airflow import Airflow
from tests.support import StackUnderTest

DAG_ID = "train_model"
MODEL = "tumour-classifier"
AUTOMATIC = {"approval": "automatic"}
PATIENCE_S = 300


@pytest.fixture(scope="session")
def finished(airflow: Airflow) -> dict[str, Any]:
    """A run of the pipeline that has ended well, and what its last task returned."""
    airflow.wait_for_dag(DAG_ID)
    before = [one["dag_run_id"] for one in airflow.under_way(DAG_ID)]
    assert not before, f"runs of {DAG_ID} are under way, and it has one at a time; end them first: {before}"
    airflow.set_paused(DAG_ID, False)
    run_id = airflow.trigger(DAG_ID, AUTOMATIC)
    state = airflow.follow(DAG_ID, run_id, patience=PATIENCE_S)
    assert state == "success", {
        one["task_id"]: airflow.task_log(DAG_ID, run_id, one["task_id"], map_index=one["map_index"])
        for one in airflow.task_instances(DAG_ID, run_id)
        if one["state"] == "failed"
    }
    return {**airflow.xcom(DAG_ID, run_id, "promote"), "run_id": run_id}


@pytest.fixture(scope="module")
def tracking(stack: StackUnderTest) -> Iterator[MlflowClient]:
    """MLflow's client, as a person from outside uses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", stack.settings.admin_user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", stack.secret("admin_password"))
        mlflow.set_tracking_uri(stack.mlflow_url)
        yield MlflowClient(stack.mlflow_url)


@pytest.fixture
def name(stack: StackUnderTest) -> Iterator[str]:
    """Of a person, who is removed at the end."""
    chosen = f"t{time.time_ns()}"
    yield chosen
    stack.make("user-remove", f"NAME={chosen}")


def password_in(exports: str) -> str:
    """What `make user` has told."""
    found = re.search(r"^export MLFLOW_TRACKING_PASSWORD=(\S+)$", exports, re.MULTILINE)
    assert found, exports
    return found[1]
