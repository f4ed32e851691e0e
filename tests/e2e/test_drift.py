"""The watch for drift: what it says of rows like those that the model was trained on, of others, and of too few."""

from __future__ import annotations

import csv
import io
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from stack.airflow import Airflow
from tests.e2e.models import Made, champion, make, put_back, ready
from tests.support import StackUnderTest, wait_until

pytestmark = pytest.mark.usefixtures("dags")

WATCH, RETRAIN = "drift_watch", "train_model"
COLUMN = "mean radius"
ROWS = 600
PATIENCE_S = 300
CLOCK = 'schedule="*/15 * * * *"'

# Missing values come by CSV, as the watch writes it.
EXAMINE = """
import io, json, sys
sys.path.insert(0, "/opt/airflow/dags")
import numpy as np, pandas as pd
from drift_watch import examine, picture

draw = np.random.default_rng(1)
names = ["as before", "all", "some", "few", "returns", "never"]
reference, live = (pd.DataFrame({name: draw.normal(size=rows) for name in names}) for rows in (455, 600))
for frame, column, rows in ((live, "all", 600), (live, "some", 180), (live, "few", 6), (live, "never", 600),
                            (reference, "returns", 137), (reference, "never", 455)):
    frame.loc[: rows - 1, column] = np.nan
live = pd.read_csv(io.StringIO(live.to_csv(index=False)))
found = examine(reference, live)
picture(found, reference, live).savefig(io.BytesIO())
print("FOUND " + json.dumps(found, allow_nan=False))
"""


@pytest.fixture(scope="module")
def dags(stack: StackUnderTest, airflow: Airflow) -> Iterator[None]:
    """Both DAGs run; the watch only when it is triggered: its clock would take part of the rows."""
    path = stack.clone / f"dags/{WATCH}.py"
    former = path.read_text()
    assert CLOCK in former
    airflow.wait_for_dag(WATCH)
    path.write_text(former.replace(CLOCK, "schedule=None"))
    was = {dag: airflow.wait_for_dag(dag)["is_paused"] for dag in (WATCH, RETRAIN)}
    try:
        wait_until(lambda: "*/15" not in str(airflow.wait_for_dag(WATCH)["timetable_summary"]), 60, "no clock")
        for dag in was:
            airflow.set_paused(dag, False)
        yield
    finally:
        path.write_text(former)
        for dag, paused in was.items():
            airflow.set_paused(dag, paused)


@pytest.fixture
def model(stack: StackUnderTest, tracking: MlflowClient) -> Iterator[Made]:
    """A new champion, whose predictions nobody has looked at. Afterwards the alias is where it was."""
    before = champion(tracking, stack.settings.serving_model)
    made = make(stack)
    made.promote(tracking)
    try:
        wait_until(lambda: ready(stack).get("version") == made.version, 30, "the new champion answers")
        yield made
    finally:
        put_back(tracking, made.name, before)


def reference(made: Made) -> list[dict[str, float]]:
    """What a version was trained on."""
    lines = csv.DictReader(io.StringIO(mlflow.artifacts.load_text(f"runs:/{made.run_id}/reference.csv")))
    return [{name: float(value) for name, value in line.items()} for line in lines]


def send(stack: StackUnderTest, made: Made, factor: float, rows: int = ROWS) -> None:
    """Rows as the model was trained on, with one column scaled; returns when they are in the store."""
    known, draw = reference(made), random.Random(1)
    drawn = [draw.choice(known) for _ in range(rows)]
    body = [row | {COLUMN: row[COLUMN] * factor} for row in drawn]
    with stack.serving() as serving:
        stored = serving.stored()
        for place in range(0, rows, 100):
            text = json.dumps({"dataframe_records": body[place : place + 100]})
            assert serving.predict(text.encode(), "application/json")["version"] == made.version
        wait_until(lambda: serving.stored() >= stored + rows, 60, "the predictions in the store")


def watch(airflow: Airflow) -> dict[str, str]:
    """A run of the watch: the state of each task."""
    run_id = airflow.trigger(WATCH)
    assert airflow.follow(WATCH, run_id, patience=PATIENCE_S) == "success"
    return {"run_id": run_id} | {one["task_id"]: one["state"] for one in airflow.task_instances(WATCH, run_id)}


def retrainings(airflow: Airflow) -> set[str]:
    """The runs of the training pipeline that the asset triggered."""
    return {run["dag_run_id"] for run in airflow.runs(RETRAIN) if run["run_type"] == "asset_triggered"}


def end(airflow: Airflow, run_id: str) -> None:
    """Ends a run of the pipeline: that it was triggered is enough here."""
    airflow.call("PATCH", f"/dags/{RETRAIN}/dagRuns/{run_id}", json={"state": "failed"})


def test_too_few_rows_are_no_reason_to_say_anything(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, model: Made
) -> None:
    """The run ends well, with its tasks skipped, and says why; nothing is logged of it."""
    send(stack, model, 1.0, rows=50)
    told = watch(airflow)
    assert {told[task] for task in ("collect", "compare", "past_threshold", "retrain")} == {"skipped"}
    assert "50 predictions by version" in airflow.task_log(WATCH, told["run_id"], "collect")
    assert looks(tracking, model) == []


def looks(tracking: MlflowClient, made: Made) -> list[Any]:
    """The watch's runs in MLflow over a version, the latest first."""
    experiment = tracking.get_experiment_by_name("drift")
    if experiment is None:
        return []
    found: list[Any] = tracking.search_runs(
        [experiment.experiment_id], f"tags.`model.version` = '{made.version}'", order_by=["start_time DESC"]
    )
    return found


def test_rows_as_it_was_trained_on_trigger_nothing(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, model: Made
) -> None:
    before = retrainings(airflow)
    send(stack, model, 1.0)
    told = watch(airflow)
    assert (told["compare"], told["past_threshold"], told["retrain"]) == ("success", "success", "skipped")
    (look,) = looks(tracking, model)
    assert look.data.metrics["drifted_share"] == 0
    assert look.data.metrics["rows"] == ROWS
    assert look.data.metrics[f"psi/{COLUMN}"] < 0.2
    # What was looked at is not looked at again.
    again = watch(airflow)
    assert again["collect"] == "skipped"
    assert retrainings(airflow) == before
    assert "drift.retraining" not in tracking.get_model_version(model.name, model.version).tags


def test_shifted_rows_trigger_one_retraining(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, model: Made
) -> None:
    """One, however often they are looked at while the champion stays: the version remembers it."""
    before = retrainings(airflow)
    send(stack, model, 1.6)
    told = watch(airflow)
    assert (told["past_threshold"], told["retrain"]) == ("success", "success")
    verdict = airflow.xcom(WATCH, told["run_id"], "compare")
    assert verdict["drifted"] == [COLUMN]
    assert verdict["share"] == pytest.approx(1 / 6)
    # Another run of the pipeline, if there is one, ends first.
    wait_until(lambda: len(retrainings(airflow) - before) == 1, PATIENCE_S, "a run that the asset triggered")
    (triggered,) = retrainings(airflow) - before
    end(airflow, triggered)

    (look,) = looks(tracking, model)
    assert look.data.tags["airflow.run_id"] == told["run_id"]
    assert f"/dags/{WATCH}/runs/{told['run_id']})" in look.data.tags["mlflow.note.content"]
    assert look.data.metrics[f"psi/{COLUMN}"] > 0.2
    assert look.data.metrics[f"ks_p/{COLUMN}"] < 0.01
    assert {one.path for one in tracking.list_artifacts(look.info.run_id)} >= {"drift.json", "drift.png"}
    report = mlflow.artifacts.load_dict(f"runs:/{look.info.run_id}/drift.json")
    assert [one["column"] for one in report["columns"] if one["drifted"]] == [COLUMN]
    assert tracking.get_model_version(model.name, model.version).tags["drift.retraining"] == told["run_id"]

    send(stack, model, 1.6)
    again = watch(airflow)
    assert (again["compare"], again["past_threshold"], again["retrain"]) == ("success", "success", "skipped")
    assert told["run_id"] in airflow.task_log(WATCH, again["run_id"], "past_threshold")
    # A second run would come with one of the scheduler's next rounds.
    time.sleep(10)
    assert retrainings(airflow) - before == {triggered}


def test_missing_values_are_drift(stack: StackUnderTest) -> None:
    """Where all or many are missing now and were not, and the other way round; each figure is a number."""
    told = stack.compose.capture("run", "--rm", "--no-deps", "-T", "airflow-cli", "python3", "-c", EXAMINE, timeout=180)
    (line,) = [line for line in told.out.splitlines() if line.startswith("FOUND ")]
    found = {one["column"]: one for one in json.loads(line.removeprefix("FOUND "))}
    assert {name for name, one in found.items() if one["drifted"]} == {"all", "some", "returns"}
    shares = {name: (one["reference_missing"], one["live_missing"]) for name, one in found.items()}
    assert shares["all"] == (0, 1)
    assert shares["some"] == (0, 0.3)
    assert shares["never"] == (1, 1)
    assert found["never"]["psi"] == 0
    figures = ("psi", "ks", "p", "missing_p", "live_missing")
    assert all(isinstance(one[name], float) for one in found.values() for name in figures)


@pytest.mark.usefixtures("model")
def test_the_demonstration(stack: StackUnderTest, airflow: Airflow) -> None:
    """`make demo-drift` from rows to the pipeline's run; a second time it says that this version has asked already."""
    before = retrainings(airflow)
    said = stack.make("demo-drift")
    new = retrainings(airflow) - before
    for run_id in new:
        end(airflow, run_id)
    assert said.code == 0, said.output
    assert len(new) == 1
    assert f"{next(iter(new))}  (triggered by the asset, once)" in said.output
    assert f"17% of the columns: {COLUMN}" in said.output
    again = stack.make("demo-drift")
    assert again.code != 0
    assert "E-DRIFT-ASKED" in again.output
