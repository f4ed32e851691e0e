"""make demo-drift: sends good rows to the served model and then shifted ones, has the drift watched for, and shows
that this triggers the training pipeline, once.

The good rows are drawn from what the model was trained on. The shifted ones are the same with one column scaled.

Changes: predictions in the store; a run of drift_watch and one of train_model in Airflow, what they make in MLflow,
a tag on the model version. Where they were paused, the DAGs are so again, but for one of which a run goes on, for it
would stand still. Exit: 0 it was triggered once, 1 it was not, 3 no stack, serving off, no model, or a retraining was
asked for before, 4 too slow.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from stack import connect, instance
from stack.airflow import Airflow
from stack.console import Step
from stack.errors import Exit, StackError, run_main
from stack.registry import Registry
from stack.serving import Serving

WATCH, RETRAIN = "drift_watch", "train_model"
# As dags/drift_watch.py has it.
REFERENCE, ASKED, COMPARED = "reference.csv", "drift.retraining", "compare"
ROWS = 600
AT_ONCE = 50
FACTOR = 1.6
SEED = 7
PATIENCE_S = 300
"""The watch took half a minute on 2 cores."""
NUMBERS = ("double", "float", "long", "integer")

Row = dict[str, float]


def main(argv: Sequence[str]) -> int:
    """Sends the rows and follows what comes of them."""
    argparse.ArgumentParser(prog="make demo-drift", description=__doc__).parse_args(argv)
    here = instance.current()
    airflow, chosen = connect.airflow(here)
    with airflow, connect.serving(here, chosen) as serving, connect.registry(here, chosen) as registry:
        schema = serving.schema()
        check_not_asked(registry, schema)
        good, shifted, column = make_rows(registry.artifact(schema["run_id"], REFERENCE), schema)
        paused = {dag: airflow.wait_for_dag(dag)["is_paused"] for dag in (RETRAIN, WATCH)}
        known = {dag: {run["dag_run_id"] for run in airflow.runs(dag)} for dag in paused}
        try:
            for dag in paused:
                airflow.set_paused(dag, False)
            wait_for_quiet(airflow)
            send(serving, good, "good rows")
            send(serving, shifted, f"rows with {column} times {FACTOR}")
            run_id = airflow.trigger(WATCH)
            with Step(f"running {WATCH}") as progress:
                airflow.follow(
                    WATCH,
                    run_id,
                    patience=PATIENCE_S,
                    on_progress=lambda now: progress.update(
                        ", ".join(f"{one['task_id']} {one['state'] or 'waiting'}" for one in now)
                    ),
                )
            verdict = find_verdict(airflow, known[WATCH])
            print(f"drifted   {verdict['share']:.0%} of the columns: {', '.join(verdict['drifted'])}")
            ui = f"{chosen.mlflow_url}/#/experiments/{verdict['experiment_id']}/runs/{verdict['run_id']}"
            print(f"mlflow    {ui}")
            triggered = wait_for_retraining(airflow, known[RETRAIN])
            print(f"retrain   {airflow.url}/dags/{RETRAIN}/runs/{triggered[0]}  (triggered by the asset, once)")
            print("          trains, and then waits in its task `approve` for a person, for a day")
        finally:
            for dag, was_paused in paused.items():
                if was_paused:
                    airflow.pause_again(dag)
    return Exit.DONE


def check_not_asked(registry: Registry, schema: dict[str, Any]) -> None:
    """Raises StackError (E-DRIFT-ASKED) where this version's drift has been answered already."""
    asked = registry.tags(schema["model"], schema["version"]).get(ASKED)
    if asked:
        raise StackError(
            "E-DRIFT-ASKED",
            f"version {schema['version']} of {schema['model']} has asked for a retraining already",
            why=f"the run {asked} of {WATCH} did; a version asks once, until there is another champion",
            fix=f"approve the run of {RETRAIN} that it triggered, or `make demo`: another champion begins anew; or "
            f"remove the version's tag {ASKED} in MLflow's pages",
        )


def make_rows(reference: str, schema: dict[str, Any]) -> tuple[list[Row], list[Row], str]:
    """Good rows, shifted rows, and the column that was scaled."""
    kinds = {one["name"]: one["type"] for one in schema["inputs"]}
    known = list(csv.DictReader(io.StringIO(reference)))
    if not known or not set(kinds) <= set(known[0]) or not set(kinds.values()) <= set(NUMBERS):
        raise StackError(
            "E-DRIFT",
            f"{REFERENCE} of version {schema['version']} is not made of the model's columns",
            why=f"the model takes {', '.join(kinds)}, as numbers; it has {', '.join(known[0]) if known else 'no rows'}",
            fix="this demonstration is for the shipped pipeline: `make demo`",
        )
    rows = [
        {
            name: float(row[name]) if kind in ("double", "float") else int(float(row[name]))
            for name, kind in kinds.items()
        }
        for row in known
    ]
    column = next((name for name, kind in kinds.items() if kind in ("double", "float")), next(iter(kinds)))
    draw = random.Random(SEED)
    good, others = ([draw.choice(rows) for _ in range(ROWS)] for _ in range(2))
    return good, [row | {column: type(row[column])(row[column] * FACTOR)} for row in others], column


def wait_for_quiet(airflow: Airflow) -> None:
    """Returns when no watch runs: one that was due at this moment would take part of the rows."""
    wait_for(
        lambda: not airflow.under_way(WATCH),
        PATIENCE_S,
        f"the runs of {WATCH} that were under way to end",
    )


def send(serving: Serving, rows: list[Row], what: str) -> None:
    """Sends rows, and returns when they are in the store."""
    stored = serving.stored()
    with Step(f"sending {len(rows)} {what}") as progress:
        for place in range(0, len(rows), AT_ONCE):
            body = json.dumps({"dataframe_records": rows[place : place + AT_ONCE]})
            serving.predict(body.encode(), "application/json")
            progress.update(f"{place + AT_ONCE} of {len(rows)} answered")
        progress.update("waiting until they are in the store")
        wait_for(lambda: serving.stored() >= stored + len(rows), 60, "serving to write the predictions to the store")


def find_verdict(airflow: Airflow, known: set[str]) -> dict[str, Any]:
    """What the runs of the watch since then found; one that was due meanwhile may have been quicker than ours."""
    verdicts = []
    for run in airflow.runs(WATCH):
        run_id = run["dag_run_id"]
        if run_id not in known and any(
            one["task_id"] == COMPARED and one["state"] == "success" for one in airflow.task_instances(WATCH, run_id)
        ):
            verdicts.append(airflow.xcom(WATCH, run_id, COMPARED))
    found: dict[str, Any] = max(verdicts, key=lambda verdict: verdict["share"], default={"share": 0})
    if not found["share"]:
        raise StackError(
            "E-DRIFT",
            "no drift was found in the shifted rows",
            why=f"the runs of {WATCH} found: {verdicts}",
            fix=f"open its runs in Airflow: {airflow.url}/dags/{WATCH}",
            changed="the predictions are in the store",
            exit_code=Exit.FAILED,
        )
    return found


def wait_for_retraining(airflow: Airflow, known: set[str]) -> list[str]:
    """The one run of the training pipeline that the asset triggered. Raises StackError (E-DRIFT) for none, or more."""

    def found() -> list[str]:
        runs = [run for run in airflow.runs(RETRAIN) if run["run_type"] == "asset_triggered"]
        return [run["dag_run_id"] for run in runs if run["dag_run_id"] not in known]

    with Step(f"waiting for {RETRAIN}"):
        wait_for(lambda: bool(found()), PATIENCE_S, f"a run of {RETRAIN} that the asset triggered")
        # A second one would come with the scheduler's next rounds.
        time.sleep(5)
    triggered = found()
    if len(triggered) != 1:
        raise StackError(
            "E-DRIFT",
            f"{RETRAIN} was triggered {len(triggered)} times",
            why=f"once was expected: {', '.join(triggered)}",
            fix=f"open its runs in Airflow: {airflow.url}/dags/{RETRAIN}",
            changed="the runs go on",
            exit_code=Exit.FAILED,
        )
    return triggered


def wait_for(fact: Callable[[], bool], patience: float, what: str) -> None:
    """Returns when a fact is so. Raises StackError (E-DRIFT) after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not fact():
        if time.monotonic() > deadline:
            raise StackError(
                "E-DRIFT",
                f"after {patience:.0f} s still waiting for {what}",
                why="see `make status`",
                fix="`make logs S=serving`, `make logs S=airflow-scheduler`",
                changed="what was sent is in the predictions' log",
                exit_code=Exit.TIMED_OUT,
            )
        time.sleep(1)


if __name__ == "__main__":
    run_main(main)
