"""A run that our tracking store creates is the one that MLflow's own creates, in the same Postgres; what MLflow's own
refuses is refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.support import StackUnderTest

CREATED: list[dict[str, Any]] = [
    {"tags": [], "run_name": "named"},
    {"tags": None, "run_name": "named"},
    {"tags": [["mlflow.runName", "tagged"], ["a", "b"]], "run_name": ""},
    {"tags": [["z", "1"], ["mlflow.runName", "both"], ["a", ""]], "run_name": "both"},
    {"tags": [["long", "v" * 8000], ["mlflow.user", "ü — 用户"]], "run_name": "n" * 250},
    {"user_id": ""},
    {"start_time": 0},
    {"start_time": 2**62},
    {"experiment": "s3"},
]
REFUSED: list[dict[str, Any]] = [
    {"tags": [["mlflow.runName", "one"]], "run_name": "another"},
    {"tags": [["mlflow.runName", ""]]},
    {"tags": [["twice", "1"], ["twice", "2"]]},
    {"tags": [["too long", "v" * 8001]]},
    {"run_name": "n" * 251},
    {"user_id": None},
    {"start_time": None},
    {"experiment": "deleted"},
    {"experiment": "999999999"},
    {"experiment": "no number"},
    {"experiment": ""},
]

BOTH = """
import json, os, sys, time
import sqlalchemy
from mlflow.entities import RunTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlstack_store import PostgresStore

kinds = (SqlAlchemyStore, PostgresStore)
stores = [kind(os.environ["MLFLOW_BACKEND_STORE_URI"], "mlflow-artifacts:/") for kind in kinds]
experiments = {}
for name, place in (("active", None), ("deleted", None), ("s3", "s3://bucket/a/b?endpoint=c#d")):
    experiments[name] = stores[0].create_experiment(f"{name}-{time.time_ns()}", place)
stores[0].delete_experiment(experiments["deleted"])

def told(store, asked):
    experiment = asked.get("experiment", "active")
    tags = asked.get("tags", [])
    try:
        run = store.create_run(
            experiments.get(experiment, experiment), asked.get("user_id", "somebody"), asked.get("start_time", 1),
            tags and [RunTag(*tag) for tag in tags], asked.get("run_name", "named"),
        )
    except Exception as error:
        return [getattr(error, "error_code", type(error).__name__)]
    rows = []
    with store.engine.connect() as connection:
        for table in ("runs", "tags"):
            question = sqlalchemy.text(f"SELECT * FROM {table} WHERE run_uuid = :run ORDER BY 1, 2")
            rows.append([dict(row._mapping) for row in connection.execute(question, {"run": run.info.run_id})])
    answer = run.to_dictionary()
    answer["data"]["tags"] = list(answer["data"]["tags"].items())
    read = store.get_run(run.info.run_id).to_dictionary()
    return json.loads(json.dumps([answer, rows, read]).replace(run.info.run_id, "ID"))

print(json.dumps([[told(store, asked) for asked in json.loads(sys.argv[1])] for store in stores]))
"""


def test_the_same_is_stored(stack: StackUnderTest) -> None:
    """Answer, rows of the run and of its tags, what is read back, or the kind of the refusal."""
    told = stack.exec("mlflow", "with-secrets", "python3", "-c", BOTH, json.dumps([*CREATED, *REFUSED]))
    assert told.code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if line.startswith("[[")]
    theirs, ours = json.loads(line)
    assert [len(answer) for answer in theirs] == [3] * len(CREATED) + [1] * len(REFUSED)
    for asked, expected, found in zip([*CREATED, *REFUSED], theirs, ours, strict=True):
        assert found == expected, asked


def test_a_name_is_made_up(tracking: MlflowClient) -> None:
    """Where none is asked for; it is the run's name and its tag."""
    experiment = tracking.create_experiment(f"runs-{time.time_ns()}")
    first, second = (tracking.create_run(experiment) for _ in range(2))
    assert first.info.run_name != second.info.run_name
    assert first.data.tags["mlflow.runName"] == first.info.run_name
    assert tracking.get_run(first.info.run_id).to_dictionary() == first.to_dictionary()


def test_two_names_are_refused(tracking: MlflowClient) -> None:
    """By name and by what to say, over HTTP."""
    with pytest.raises(MlflowException, match=r"one.*another|another.*one"):
        tracking.create_run("0", tags={"mlflow.runName": "one"}, run_name="another")
