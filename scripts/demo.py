"""make demo: runs the shipped training pipeline, follows it, and prints where its results are.

Changes: a DAG run in Airflow; runs, a model version and an alias in MLflow; data in S3. The DAG's paused state is put
back afterwards, unless a run goes on: a paused DAG's stands still. Exit: 0 the run succeeded, 1 it failed, 3 no stack,
or another run is under way, 4 too slow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from stack import connect, instance, settings
from stack.airflow import Airflow
from stack.console import Step, say
from stack.errors import Exit, StackError, run_main

DAG_ID = "train_model"
PATIENCE_S = 600
"""The run took 30 s on 2 cores; slower machines get twenty times that."""


def main(argv: Sequence[str]) -> int:
    """Triggers the pipeline and follows it."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--damage-data", action="store_true", help="spoil the data: the validation stops the run")
    arguments = parser.parse_args(argv)
    airflow, chosen = connect.airflow(instance.current())
    with airflow:
        was_paused = airflow.wait_for_dag(DAG_ID)["is_paused"]
        check_nothing_runs(airflow)
        airflow.set_paused(DAG_ID, False)
        try:
            run_id = airflow.trigger(DAG_ID, {"approval": "automatic", "damage_data": arguments.damage_data})
            with Step(f"running {DAG_ID}") as progress:

                def look(now: list[dict[str, Any]]) -> None:
                    show(progress, now)
                    if not any(one["state"] for one in now):
                        give_way(airflow, run_id)

                state = airflow.follow(DAG_ID, run_id, patience=PATIENCE_S, on_progress=look)
        finally:
            if was_paused:
                airflow.pause_again(DAG_ID)
        print(f"run       {airflow.url}/dags/{DAG_ID}/runs/{run_id}  ({state})")
        if state == "success":
            print_results(airflow, chosen, run_id)
            return Exit.DONE
        for one in airflow.task_instances(DAG_ID, run_id):
            if one["state"] == "failed":
                log = airflow.task_log(
                    DAG_ID, run_id, one["task_id"], map_index=one["map_index"], attempt=one["try_number"]
                )
                say(f"{one['task_id']} failed: {reason(log)}")
    return Exit.FAILED


def check_nothing_runs(airflow: Airflow) -> None:
    """Raises StackError (E-RUN-WAITS) where a run is under way: the pipeline has one at a time, and one that waits for
    its approval may do so for a day."""
    for run in airflow.under_way(DAG_ID):
        raise waits(airflow, run)


def give_way(airflow: Airflow, run_id: str) -> None:
    """Where another run has taken the place of one that has not begun: deletes that one, and raises StackError
    (E-RUN-WAITS). A weekly run that was due while the DAG was paused begins when it is unpaused."""
    for run in airflow.under_way(DAG_ID):
        if run["dag_run_id"] == run_id or run["state"] != "running":
            continue
        other = waits(airflow, run)
        try:
            airflow.call("DELETE", f"/dags/{DAG_ID}/dagRuns/{run_id}")
        except StackError:
            # The other one has just ended, and ours has begun.
            return
        raise other


def waits(airflow: Airflow, run: dict[str, Any]) -> StackError:
    """The error of another run that is under way."""
    run_id = run["dag_run_id"]
    now = [one["task_id"] for one in airflow.task_instances(DAG_ID, run_id) if one["state"] == "awaiting_input"]
    return StackError(
        "E-RUN-WAITS",
        f"a run of {DAG_ID} is under way already",
        why=f"{run_id} is {run['state']}{' and waits for a person: ' + now[0] if now else ''}; one runs at a time",
        fix=f"answer it, or end it: {airflow.url}/dags/{DAG_ID}/runs/{run_id}; then the same command again",
    )


def show(progress: Step, instances: list[dict[str, Any]]) -> None:
    """Progress: how many tasks are done and which one runs."""
    done = sum(one["state"] == "success" for one in instances)
    running = [one["rendered_map_index"] or one["task_id"] for one in instances if one["state"] == "running"]
    progress.update(f"{done} of {len(instances)} tasks done" + (f"; running {', '.join(running)}" if running else ""))


def reason(log: str) -> str:
    """The line of a task's log that says why it failed."""
    lines = [
        line
        for line in log.splitlines()
        if "not fit" in line or "not good enough" in line or "Error" in line or "Exception" in line
    ]
    return lines[-1] if lines else "see its log"


def print_results(airflow: Airflow, chosen: settings.Settings, run_id: str) -> None:
    """The links to what the run made."""
    best = airflow.xcom(DAG_ID, run_id, "promote")
    ui = f"{chosen.mlflow_url}/#"
    metrics = best["metrics"]
    print(f"best      {best['name']}: roc_auc {metrics['roc_auc']:.4f}, accuracy {metrics['accuracy_score']:.4f}")
    print(f"compare   {ui}/experiments/{best['experiment_id']}")
    print(f"mlflow    {ui}/experiments/{best['experiment_id']}/runs/{best['run_id']}")
    print(
        f"model     {ui}/models/{best['model']}/versions/{best['version']}  (models:/{best['model']}@{best['alias']})"
    )


if __name__ == "__main__":
    run_main(main)
