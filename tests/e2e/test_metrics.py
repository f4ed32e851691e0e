"""What our tracking store writes of a batch of metrics is what MLflow's own writes, in the same Postgres."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from tests.support import StackUnderTest

BATCHES: list[list[tuple[str, float, int, int]]] = [
    # key, value, timestamp, step
    [("loss", 0.5, 10, 0), ("loss", 0.4, 11, 1), ("accuracy", 0.1, 10, 0)],
    # An older step, a younger moment of the same step, a larger value of the same moment, a smaller one.
    [("loss", 0.9, 12, 0), ("accuracy", 0.2, 11, 0), ("accuracy", 0.3, 11, 0), ("accuracy", 0.25, 11, 0)],
    # All of it once more, with one that is new in the middle: a client that tries again.
    [("loss", 0.5, 10, 0), ("loss", 0.3, 13, 2), ("loss", 0.4, 11, 1)],
    # The same metric twice in a batch; a step below zero; no numbers at all.
    [("loss", 0.2, 14, 3), ("loss", 0.2, 14, 3), ("early", 1.0, 1, -5)],
    [("odd", float("nan"), 1, 0), ("odd", 0.0, 1, 0), ("odd", float("nan"), 1, 0)],
    [("even", 0.0, 1, 0), ("even", float("nan"), 1, 0)],
    [("odd", float("inf"), 1, 1), ("low", float("-inf"), 1, 1), ("low", float("nan"), 1, 2)],
    [("a key/of.some-length with spaces", 1e-300, 2**50, 2**40), ("whole", 3, 5, 5)],
    [],
    [(f"k{number}", number / 7, 20, 1) for number in range(500)],
    [(f"k{number}", number / 7, 21, 1) for number in range(499, -1, -1)],
    # Late arrivals: part of the history, and not the latest.
    [("loss", 9.0, 99, 1), ("k7", 9.0, 20, 1), ("k8", -9.0, 21, 1)],
]

BOTH = """
import json, os, sys
from mlflow.entities import Metric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlstack_store import PostgresStore
import sqlalchemy

batches = json.loads(sys.argv[1])
told = []
for kind in (SqlAlchemyStore, PostgresStore):
    store = kind(os.environ["MLFLOW_BACKEND_STORE_URI"], "mlflow-artifacts:/")
    name = f"compared-{kind.__name__}"
    found = store.get_experiment_by_name(name)
    experiment = found.experiment_id if found else store.create_experiment(name)
    run = store.create_run(experiment, "somebody", 1, [], kind.__name__).info.run_id
    for batch in batches:
        store.log_batch(run, [Metric(*one) for one in batch], [], [])
    store.log_metric(run, Metric("single", 1.5, 3, 4))
    with store.engine.connect() as connection:
        told.append({
            table: sorted(
                [list(map(str, row)) for row in connection.execute(
                    sqlalchemy.text(
                        f"SELECT key, value, timestamp, step, is_nan FROM {table} WHERE run_uuid = :run"
                    ), {"run": run})]
            )
            for table in ("metrics", "latest_metrics")
        })
print(json.dumps(told))
"""


def test_the_same_is_stored(stack: StackUnderTest) -> None:
    """History and latest values, row by row, after batches that each are special in some way."""
    told = stack.exec("mlflow", "with-secrets", "python3", "-c", BOTH, json.dumps(BATCHES))
    assert told.code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if line.startswith("[{")]
    theirs, ours = json.loads(line)
    assert len(theirs["metrics"]) > 1000
    assert ours == theirs


def test_the_server_uses_it(stack: StackUnderTest) -> None:
    """The plugin is registered in place of MLflow's own for Postgres, and is one of its kind."""
    code = (
        "import os\n"
        "from mlflow.server.handlers import _get_tracking_store\n"
        "store = _get_tracking_store(os.environ['MLFLOW_BACKEND_STORE_URI'], 'mlflow-artifacts:/')\n"
        "print(type(store).__name__)\n"
    )
    told = stack.python("mlflow", code)
    assert "PostgresStore" in told.output.splitlines(), told.output


@pytest.fixture
def run_id(tracking: MlflowClient) -> str:
    found = tracking.get_experiment_by_name("metrics")
    experiment = found.experiment_id if found else tracking.create_experiment("metrics")
    return str(tracking.create_run(experiment).info.run_id)


def test_what_is_not_a_metric_is_refused_as_a_whole(tracking: MlflowClient, run_id: str) -> None:
    """And so is anything for a run that was deleted."""
    stamp = int(time.time() * 1000)
    with pytest.raises(MlflowException, match="metric"):
        tracking.log_batch(run_id, metrics=[Metric("good", 1.0, stamp, 0), Metric("bad?", 1.0, stamp, 0)])
    assert tracking.get_run(run_id).data.metrics == {}
    tracking.delete_run(run_id)
    with pytest.raises(MlflowException, match="active"):
        tracking.log_batch(run_id, metrics=[Metric("good", 1.0, stamp, 0)])


def test_clients_that_write_the_same_keys_at_once(tracking: MlflowClient, run_id: str) -> None:
    """Each in an order of its own: none is refused, and the latest is the highest step's."""
    keys = [f"k{number}" for number in range(50)]

    def log(step: int) -> None:
        turned: list[Any] = keys[step:] + keys[:step]
        tracking.log_batch(run_id, metrics=[Metric(key, float(step), 1, step) for key in turned])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(log, range(48)))
    assert tracking.get_run(run_id).data.metrics == dict.fromkeys(keys, 47.0)
    assert len(tracking.get_metric_history(run_id, "k7")) == 48
