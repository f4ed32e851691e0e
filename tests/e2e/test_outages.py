"""MLflow, or the object store, goes away in the middle of a pipeline's run: the run goes on once it is back, and
what it registers is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlflow import MlflowClient

from stack.airflow import FINISHED, Airflow
from tests.e2e.conftest import AUTOMATIC, DAG_ID, MODEL, PATIENCE_S
from tests.support import StackUnderTest, run, wait_until

MEETS_IT_S = 120
"""Until a task notices: boto3 tries for some seconds before the task fails, MLflow's client says each of its tries."""
GIVEN_UP_S = 900
"""Until all tries of a task have failed for want of a service."""


@contextlib.contextmanager
def away(stack: StackUnderTest, service: str) -> Iterator[None]:
    """The service is killed, and started again at the end."""
    name = stack.container(service)
    assert run("docker", "kill", name).code == 0
    try:
        yield
    finally:
        assert run("docker", "start", name).code == 0
        wait_until(lambda: stack.inspect(service)["State"]["Health"]["Status"] == "healthy", 120, f"{service} is back")


def begun(airflow: Airflow, run_id: str, task_id: str, *states: str) -> Callable[[], bool]:
    """Whether any instance of a task is in one of some states."""

    def look() -> bool:
        found = airflow.task_instances(DAG_ID, run_id)
        assert "failed" not in {one["state"] for one in found}
        return any(one["task_id"] == task_id and one["state"] in states for one in found)

    return look


def lines_with(stack: StackUnderTest, run_id: str, text: str) -> int:
    """How many lines with a text are in the logs of a run's tasks. Not by the API, which asks the store for them."""
    logs = f"/opt/airflow/logs/dag_id={DAG_ID}/run_id={run_id}"
    return len(stack.exec("airflow-worker", "grep", "-rhF", text, logs).output.splitlines())


def tries(stack: StackUnderTest, airflow: Airflow, run_id: str) -> int:
    """How often a task of the run has been tried again, or one's client has."""
    tasks = airflow.task_instances(DAG_ID, run_id)
    again = sum(one["try_number"] - 1 + (one["state"] == "up_for_retry") for one in tasks if one["try_number"])
    return int(again) + lines_with(stack, run_id, "Retrying (")


def wait_for(stack: StackUnderTest, airflow: Airflow, run_id: str, task_id: str, state: str) -> Callable[[], bool]:
    """Waits until a task is in a state; whether something has been tried again since then. Counted before each look:
    the outage is to follow the last one at once."""
    there, before = begun(airflow, run_id, task_id, state), 0

    def look() -> bool:
        nonlocal before
        before = tries(stack, airflow, run_id)
        return there()

    wait_until(look, PATIENCE_S, f"{task_id} is {state}")
    return lambda: tries(stack, airflow, run_id) > before


def versions(tracking: MlflowClient, run_id: str) -> list[Any]:
    """The model versions that an Airflow run registered."""
    return [
        one for one in tracking.search_model_versions(f"name = '{MODEL}'") if one.tags.get("airflow.run_id") == run_id
    ]


@pytest.mark.parametrize(
    "outages",
    [
        [("minio", "train", "running"), ("mlflow", "choose", "success")],
        pytest.param([("mlflow", "train", "running"), ("mlflow", "promote", "success")], marks=pytest.mark.long),
        pytest.param([("minio", "evaluate", "running"), ("mlflow", "register", "success")], marks=pytest.mark.long),
        pytest.param([("minio", "promote", "success")], marks=pytest.mark.long),
    ],
    ids=lambda outages: "-".join(f"{service}-{task_id}" for service, task_id, _ in outages),
)
def test_away_for_a_while(
    stack: StackUnderTest,
    airflow: Airflow,
    tracking: MlflowClient,
    finished: dict[str, Any],
    outages: list[tuple[str, str, str]],
) -> None:
    """From when a task runs, or has ended and the next one begins, until a task has met it: the run succeeds all the
    same, with one whole version, and no run of MLflow is left as running."""
    run_id = airflow.trigger(DAG_ID, AUTOMATIC)
    for service, task_id, state in outages:
        missed = wait_for(stack, airflow, run_id, task_id, state)
        with away(stack, service):
            wait_until(missed, MEETS_IT_S, f"a task meets that {service} is away")
    assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "success"
    (version,) = versions(tracking, run_id)
    assert version.status == "READY"
    # A search does not tell the aliases.
    assert tracking.get_model_version(MODEL, version.version).aliases == ["champion"]
    assert "challenger" not in tracking.get_registered_model(MODEL).aliases
    query = f"tags.`airflow.run_id` = '{run_id}'"
    runs = tracking.search_runs([finished["experiment_id"]], filter_string=query)
    assert [one.info.run_name for one in runs if one.info.status == "RUNNING"] == []
    assert len([one for one in runs if one.info.status == "FINISHED"]) == 3
    assert tracking.get_logged_model(version.source.removeprefix("models:/")).status == "READY"


@pytest.mark.parametrize(
    ("service", "task_id", "states"),
    [
        ("minio", "validate", ["running", "success"]),
        # MLflow's client asks for two minutes in each of the three tries.
        pytest.param("mlflow", "choose", ["success"], marks=pytest.mark.long),
    ],
)
def test_away_for_good(
    stack: StackUnderTest,
    airflow: Airflow,
    tracking: MlflowClient,
    finished: dict[str, Any],
    service: str,
    task_id: str,
    states: list[str],
) -> None:
    """From before anything is trained, or before it is registered: the run fails, no version is made, the champion
    stays."""
    before = tracking.get_model_version_by_alias(MODEL, "champion").version
    assert finished["version"]
    run_id = airflow.trigger(DAG_ID, AUTOMATIC)
    wait_until(begun(airflow, run_id, task_id, *states), PATIENCE_S, f"{task_id}: {' or '.join(states)}")
    with away(stack, service):
        wait_until(lambda: airflow.run_state(DAG_ID, run_id) in FINISHED, GIVEN_UP_S, "the run ends")
    assert airflow.run_state(DAG_ID, run_id) == "failed"
    assert versions(tracking, run_id) == []
    assert tracking.get_model_version_by_alias(MODEL, "champion").version == before


@pytest.mark.long
def test_a_smoke_test_waits_for_serving(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, finished: dict[str, Any]
) -> None:
    """Which is being made anew while the alias moves: that is no reason to take a model back."""
    assert finished["version"]
    run_id = airflow.trigger(DAG_ID, AUTOMATIC)
    wait_until(begun(airflow, run_id, "register", "success"), PATIENCE_S, "the model is registered")

    def asks_again() -> bool:
        # It looks that nothing has failed, too.
        begun(airflow, run_id, "smoke_test")()
        # Once a second, where an attempt that gives up says it once.
        return lines_with(stack, run_id, "asking http") > 2

    with away(stack, "serving"):
        wait_until(asks_again, PATIENCE_S, "the smoke test asks again")
    assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "success"
    (task,) = [one for one in airflow.task_instances(DAG_ID, run_id) if one["task_id"] == "smoke_test"]
    assert task["try_number"] == 1
    (version,) = versions(tracking, run_id)
    assert tracking.get_model_version_by_alias(MODEL, "champion").version == version.version


@pytest.mark.long
def test_a_champion_that_nobody_could_test_loses_the_alias(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, finished: dict[str, Any]
) -> None:
    """MLflow goes away once the alias has moved, and comes back when the smoke test has been given up."""
    before = tracking.get_model_version_by_alias(MODEL, "champion").version
    assert finished["version"]
    run_id = airflow.trigger(DAG_ID, AUTOMATIC)
    wait_until(begun(airflow, run_id, "promote", "success"), PATIENCE_S, "the alias has moved")

    def restoring() -> bool:
        found = {one["task_id"]: one["state"] for one in airflow.task_instances(DAG_ID, run_id)}
        return found["smoke_test"] == "failed" and found["restore"] == "running"

    with away(stack, "mlflow"):
        wait_until(restoring, PATIENCE_S, "the smoke test is given up")
    assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
    assert tracking.get_model_version_by_alias(MODEL, "champion").version == before
    assert versions(tracking, run_id) != []
