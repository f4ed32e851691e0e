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
def finished(stack: StackUnderTest, airflow: Airflow) -> dict[str, Any]:
    """A run of the pipeline that has ended well: what its last task returned, and what `make demo` said of it, which
    began it as a newcomer does, from a DAG that is paused. The tests need it unpaused."""
    airflow.wait_for_dag(DAG_ID)
    airflow.set_paused(DAG_ID, True)
    said = stack.make("demo")
    paused_again = airflow.wait_for_dag(DAG_ID)["is_paused"]
    airflow.set_paused(DAG_ID, False)
    assert said.code == 0, said.output
    run_id = run_in(said.output)
    result = airflow.xcom(DAG_ID, run_id, "promote")
    return {**result, "run_id": run_id, "said": said.output, "paused_again": paused_again}


@pytest.fixture(scope="module")
def tracking(stack: StackUnderTest) -> Iterator[MlflowClient]:
    """MLflow's client, as a person from outside uses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", stack.settings.admin_user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", stack.secret("admin_password"))
        mlflow.set_tracking_uri(stack.mlflow_url)
        yield MlflowClient(stack.mlflow_url)


@pytest.fixture
def username(stack: StackUnderTest) -> Iterator[str]:
    """Of a person, who is removed at the end."""
    chosen = f"t{time.time_ns()}"
    yield chosen
    stack.make("user-remove", f"NAME={chosen}")


def run_in(demo: str) -> str:
    """The run's id, from what `make demo` has told."""
    found = re.search(rf"^run +http://\S+/dags/{DAG_ID}/runs/(\S+)  \(\w+\)$", demo, re.MULTILINE)
    assert found, demo
    return found[1]


def password_in(exports: str) -> str:
    """What `make user` has told."""
    found = re.search(r"^export MLFLOW_TRACKING_PASSWORD=(\S+)$", exports, re.MULTILINE)
    assert found, exports
    return found[1]
