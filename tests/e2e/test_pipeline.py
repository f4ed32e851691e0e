"""The shipped pipeline, through every service, looked at from outside with each service's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from stack.airflow import Airflow
from tests.e2e.conftest import AUTOMATIC, DAG_ID, MODEL
from tests.support import StackUnderTest, run, wait_until


def test_every_task_ran_once(airflow: Airflow, finished: dict[str, Any]) -> None:
    """Each at its first attempt, and nothing had to be restored."""
    instances = airflow.task_instances(DAG_ID, finished["run_id"])
    single = ("ingest", "validate", "features", "choose", "register", "approve", "promote", "smoke_test", "announce")
    expected = [(name, -1, "success", 1) for name in single]
    expected += [(name, index, "success", 1) for name in ("train", "evaluate") for index in range(3)]
    expected.append(("restore", -1, "skipped", 0))
    assert sorted((one["task_id"], one["map_index"], one["state"], one["try_number"]) for one in instances) == sorted(
        expected
    )


def test_the_data_is_in_s3(stack: StackUnderTest, finished: dict[str, Any]) -> None:
    """The ingested CSV has all 569 rows."""
    key = f"{DAG_ID}/{finished['run_id']}/raw.csv"
    body = stack.s3("pipelines").get_object(Bucket="pipelines", Key=key)["Body"].read().decode()
    assert len(body.splitlines()) == 570


SIDES = """
import io
import sys

import pandas as pd

sys.path.insert(0, "/opt/airflow/dags")
from train_model import EXPECTED, TARGET, held_back, load_source

before = load_source().drop_duplicates()
more = before.sample(80, random_state=1)
more[[*EXPECTED]] *= 1.01
twins = before.sample(20, random_state=2)
twins[TARGET] = 1 - twins[TARGET]
after = pd.concat([more, before.sample(frac=1, random_state=3).iloc[100:], twins], ignore_index=True)
after = pd.read_csv(io.StringIO(after.to_csv(index=False)))

def rows(frame):
    return set(frame[[*EXPECTED]].itertuples(index=False, name=None))

part, now = held_back(before), held_back(after)
print("SHARE", part.mean())
print("SEEN", len(rows(before[~part]) & rows(after[now])), len(rows(before[part]) & rows(after[~now])))
print("KNOWN", len(rows(before[~part]) & rows(after[~now])) > 200)
try:
    held_back(before[part | (before[TARGET] == 1)])
except ValueError as error:
    print("REFUSED", error)
"""


def test_no_row_changes_sides(stack: StackUnderTest) -> None:
    """Rows come and go, their order changes, some have a twin with another answer: none that a model was trained on is
    among those that it is measured on the next time."""
    told = stack.python("airflow-worker", SIDES).output
    found = dict(line.split(" ", 1) for line in told.splitlines() if line.startswith(("SHARE", "SEEN", "KNOWN", "REF")))
    assert 0.25 < float(found["SHARE"]) < 0.35, told
    assert (found["SEEN"], found["KNOWN"]) == ("0 0", "True"), told
    assert "too few rows of one class" in found["REFUSED"]


def test_the_demonstration_says_where_its_results_are(stack: StackUnderTest, finished: dict[str, Any]) -> None:
    """Each link once, and the DAG is paused, as it was."""
    ui = f"{stack.mlflow_url}/#"
    for told in (
        f"run       {stack.airflow_url}/dags/{DAG_ID}/runs/{finished['run_id']}  (success)",
        f"best      {finished['name']}: roc_auc {finished['metrics']['roc_auc']:.4f}",
        f"compare   {ui}/experiments/{finished['experiment_id']}\n",
        f"mlflow    {finished['url']}\n",
        f"model     {ui}/models/{MODEL}/versions/{finished['version']}  (models:/{MODEL}@champion)",
    ):
        assert finished["said"].count(told) == 1, (told, finished["said"])
    assert finished["paused_again"]


def test_all_candidates_are_in_mlflow(tracking: MlflowClient, finished: dict[str, Any]) -> None:
    """Each has its parameters, plausible metrics, its plots and a link to the Airflow run that made it."""
    runs = tracking.search_runs(
        [finished["experiment_id"]], filter_string=f"tags.`airflow.run_id` = '{finished['run_id']}'"
    )
    assert {one.data.params["name"] for one in runs} == {"logistic-regression", "xgboost", "neural-network"}
    for one in runs:
        assert one.info.status == "FINISHED"
        assert {"cv_roc_auc", "roc_auc", "f1_score", "accuracy_score"} <= set(one.data.metrics)
        assert 0.9 < one.data.metrics["roc_auc"] <= 1
        assert f"/dags/{DAG_ID}/runs/{finished['run_id']}" in one.data.tags["mlflow.note.content"]
        plots = {found.path for found in tracking.list_artifacts(one.info.run_id)}
        assert {"roc_curve_plot.png", "confusion_matrix.png", "reference.csv"} <= plots
    best = max(runs, key=lambda one: float(one.data.metrics["cv_roc_auc"]))
    assert best.data.metrics["roc_auc"] == pytest.approx(finished["metrics"]["roc_auc"])
    (network,) = [one for one in runs if one.data.params["name"] == "neural-network"]
    losses = tracking.get_metric_history(network.info.run_id, "train_loss")
    assert len(losses) > 10
    assert losses[-1].value < losses[0].value


def test_the_best_model_is_registered(tracking: MlflowClient, finished: dict[str, Any]) -> None:
    """The version that this run promoted has the best candidate's metrics, and says which Airflow run made it."""
    version = tracking.get_model_version(MODEL, finished["version"])
    metrics = tracking.get_run(version.run_id).data.metrics
    assert metrics["roc_auc"] == pytest.approx(finished["metrics"]["roc_auc"])
    assert version.tags["airflow.run_id"] == finished["run_id"]
    assert version.tags["airflow.url"].endswith(f"/dags/{DAG_ID}/runs/{finished['run_id']}")
    assert "previous_champion" in version.tags


def test_the_champion_was_asked_where_it_is_served(
    airflow: Airflow, tracking: MlflowClient, finished: dict[str, Any]
) -> None:
    """And the logs have the way to MLflow."""
    log = airflow.task_log(DAG_ID, finished["run_id"], "smoke_test")
    assert f"asked http://serving:5002, where version {finished['version']} is served" in log
    assert "20 of 20 answers are those of the evaluation" in log
    assert tracking.get_run(finished["url"].rpartition("/")[2]).info.experiment_id == finished["experiment_id"]
    trained = [airflow.task_log(DAG_ID, finished["run_id"], "train", map_index=index) for index in range(3)]
    assert sum(finished["url"] in one for one in trained) == 1
    assert finished["url"] in airflow.task_log(DAG_ID, finished["run_id"], "announce")


def test_artifacts_are_in_minio(stack: StackUnderTest, tracking: MlflowClient, finished: dict[str, Any]) -> None:
    """The plot comes through MLflow; the same bytes, and the model, are objects in its bucket."""
    champion = tracking.get_model_version_by_alias(MODEL, "champion")
    plot = mlflow.artifacts.download_artifacts(run_id=champion.run_id, artifact_path="roc_curve_plot.png")
    with open(plot, "rb") as file:
        picture = file.read()
    assert picture.startswith(b"\x89PNG")
    store = stack.s3("mlflow")
    key = f"{finished['experiment_id']}/{champion.run_id}/artifacts/roc_curve_plot.png"
    assert store.get_object(Bucket="mlflow", Key=key)["Body"].read() == picture
    listed = store.list_objects_v2(Bucket="mlflow", Prefix=f"{finished['experiment_id']}/models/")["Contents"]
    assert any(one["Key"].endswith("/MLmodel") for one in listed)


def ask(stack: StackUnderTest, role: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """A statement in a role's own database; its rows."""
    with stack.database(role) as connection, connection.cursor() as cursor:
        cursor.execute(sql, values)
        return list(cursor.fetchall()) if cursor.description else []


def test_rows_are_in_postgres(stack: StackUnderTest, finished: dict[str, Any]) -> None:
    """The run is a row in Airflow's database, its metrics are rows in MLflow's, its results in Celery's."""
    assert ask(stack, "airflow", "SELECT state FROM dag_run WHERE run_id = %s", finished["run_id"]) == [("success",)]
    assert len(ask(stack, "mlflow", "SELECT key FROM tags WHERE value = %s", finished["run_id"])) == 3
    assert ask(stack, "celery", "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'")[0][0] >= 6


def test_the_asset_has_the_event_of_the_run(airflow: Airflow, finished: dict[str, Any]) -> None:
    """What a DAG that is scheduled on it gets to know."""
    events = airflow.call("GET", "/assets/events", params={"source_run_id": finished["run_id"]})["asset_events"]
    assert [(one["name"], one["extra"]["version"], one["extra"]["mlflow"]) for one in events] == [
        (f"mlstack://models/{MODEL}/champion", finished["version"], finished["url"])
    ]


NEXT_RUN = """
from datetime import datetime, timezone
from unittest import mock

from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.encoders import coerce_to_core_timetable
from airflow.timetables.base import TimeRestriction

dag = DagBag("/opt/airflow/dags/train_model.py").dags["train_model"]
timetable = coerce_to_core_timetable(dag.timetable)
for day in range(7):
    now = datetime(2026, 11, 30 - day, 10, 0, tzinfo=timezone.utc)
    with mock.patch("airflow.timetables.trigger.utcnow", return_value=now):
        found = timetable.next_dagrun_info(
            last_automated_data_interval=None, restriction=TimeRestriction(None, None, catchup=False)
        )
    print("NEXT", now.strftime("%a"), found.run_after > now)
"""


def test_unpausing_it_on_a_monday_runs_nothing_beside(stack: StackUnderTest) -> None:
    """The weekly run of that night is over: it would take the place of the first one that a person asks for."""
    command = ("run", "--rm", "-T", "--no-deps", "airflow-cli", "with-secrets", "python3", "-c", NEXT_RUN)
    told = run(*stack.compose.command(*command))
    found = [line for line in told.output.splitlines() if line.startswith("NEXT")]
    assert found == [f"NEXT {day} True" for day in ("Mon", "Sun", "Sat", "Fri", "Thu", "Wed", "Tue")], told.output


def test_a_weekly_run_that_was_due_while_paused_goes_first(
    stack: StackUnderTest, airflow: Airflow, finished: dict[str, Any]
) -> None:
    """It begins when `make demo` unpauses the DAG, and waits for a person: the demonstration says so, and leaves no
    run of its own behind it."""
    assert finished["version"]
    before = {run["dag_run_id"] for run in airflow.runs(DAG_ID)}
    airflow.set_paused(DAG_ID, True)
    ask(
        stack,
        "airflow",
        "UPDATE dag SET next_dagrun = now() - interval '1 hour', next_dagrun_create_after = now() - interval '1 hour',"
        " next_dagrun_data_interval_start = now() - interval '1 hour',"
        " next_dagrun_data_interval_end = now() - interval '1 hour' WHERE dag_id = %s",
        DAG_ID,
    )
    try:
        said = stack.make("demo")
        (left,) = [run for run in airflow.runs(DAG_ID) if run["dag_run_id"] not in before]
        assert said.code != 0, said.output
        assert "E-RUN-WAITS" in said.output, said.output
        assert left["dag_run_id"] in said.output
        assert left["run_type"] == "scheduled"
        assert "was paused, and is not any more" in said.output
        assert airflow.wait_for_dag(DAG_ID)["is_paused"] is False
    finally:
        airflow.set_paused(DAG_ID, False)
        for run in airflow.runs(DAG_ID):
            if run["dag_run_id"] not in before:
                airflow.call("PATCH", f"/dags/{DAG_ID}/dagRuns/{run['dag_run_id']}", json={"state": "failed"})


def test_the_task_log_comes_from_s3(stack: StackUnderTest, airflow: Airflow, finished: dict[str, Any]) -> None:
    """The API server shows a task's log from the bucket, where alone it is: the file in the worker is empty."""
    path = f"dag_id={DAG_ID}/run_id={finished['run_id']}/task_id=ingest/attempt=1.log"
    log = airflow.task_log(DAG_ID, finished["run_id"], "ingest")
    assert f"s3://airflow-logs/tasks/{path}" in log
    assert "569 rows written" in log
    stored = stack.s3("airflow-logs").get_object(Bucket="airflow-logs", Key=f"tasks/{path}")["Body"].read()
    assert b"569 rows written" in stored
    assert stack.exec("airflow-worker", "test", "-s", f"/opt/airflow/logs/{path}").code != 0


def test_a_broken_dag_file_harms_nobody(airflow: Airflow, stack: StackUnderTest) -> None:
    """A file with a syntax error is shown as such within seconds; the others stay, and a new one comes."""
    dags = stack.clone / "dags"
    broken, fresh = dags / "broken.py", dags / "fresh.py"
    try:
        # A file is looked at only when it mentions Airflow and DAGs.
        broken.write_text("from airflow.sdk import dag\ndef broken(:\n")
        fresh.write_text(
            "from airflow.sdk import dag, task\n"
            "@dag(schedule=None)\ndef fresh():\n    @task\n    def one(): return 1\n    one()\nfresh()\n"
        )
        errors = wait_until(
            lambda: airflow.call("GET", "/importErrors")["import_errors"], 30, "the import error of broken.py"
        )
        assert [one["filename"].rsplit("/", 1)[-1] for one in errors] == ["broken.py"], json.dumps(errors)
        airflow.wait_for_dag("fresh", patience=30)
        airflow.set_paused("fresh", False)
        assert airflow.follow("fresh", airflow.trigger("fresh"), patience=60) == "success"
        assert airflow.wait_for_dag(DAG_ID)["has_import_errors"] is False
    finally:
        broken.unlink(missing_ok=True)
        fresh.unlink(missing_ok=True)
    wait_until(
        lambda: not airflow.call("GET", "/importErrors")["import_errors"], 60, "the import error's end with its file"
    )


def test_a_dag_that_the_scheduler_runs_is_not_tested_beside_it(airflow: Airflow, stack: StackUnderTest) -> None:
    """Its run would be shared out between the worker and the process that tests it."""
    airflow.set_paused(DAG_ID, False)
    before = airflow.call("GET", f"/dags/{DAG_ID}/dagRuns")["total_entries"]
    refused = stack.make("dag-test", f"DAG={DAG_ID}")
    assert refused.code != 0
    assert "E-DAG-LIVE" in refused.output
    assert airflow.call("GET", f"/dags/{DAG_ID}/dagRuns")["total_entries"] == before


@pytest.fixture
def paused(airflow: Airflow) -> Iterator[None]:
    was = airflow.wait_for_dag(DAG_ID)["is_paused"]
    airflow.set_paused(DAG_ID, True)
    yield
    airflow.set_paused(DAG_ID, was)


@pytest.mark.usefixtures("paused")
def test_one_process_runs_it_as_well(stack: StackUnderTest, tracking: MlflowClient) -> None:
    """`make dag-test`, with the store and MLflow that a task has; a run that fails is a command that fails."""
    before = tracking.get_model_version_by_alias(MODEL, "champion").version
    spoilt = stack.make("dag-test", f"DAG={DAG_ID}", """ARGS=--conf '{"damage_data": true}'""")
    assert spoilt.code != 0
    assert "the data is not fit for training" in spoilt.output
    assert tracking.get_model_version_by_alias(MODEL, "champion").version == before
    # As where SERVING is off, which it is by default.
    command = ("run", "--rm", "-T", "--no-deps", "-e", "SERVING_URL=", "airflow-cli", "airflow", "dags", "test", DAG_ID)
    told = run(*stack.compose.command(*command, "--conf", json.dumps(AUTOMATIC)), timeout=600)
    assert told.code == 0, told.output[-3000:]
    assert "nothing is served (SERVING): asking the model itself" in told.output
    assert "unrunnable tasks" not in told.output
    assert int(tracking.get_model_version_by_alias(MODEL, "champion").version) > int(before)
