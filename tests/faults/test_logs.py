"""No attempt's log is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stack.airflow import Airflow
from tests.support import StackUnderTest, dag_file, run, wait_until

WORKER = "airflow-worker"
DAG_ID = "fault_late_log"
LOGS = "/opt/airflow/logs"


@pytest.fixture
def late_log(stack: StackUnderTest, airflow: Airflow) -> Iterator[None]:
    """The DAG is there."""
    with dag_file(stack, "tests/faults/log_dags.py"):
        airflow.wait_for_dag(DAG_ID)
        airflow.set_paused(DAG_ID, False)
        yield


@pytest.mark.usefixtures("late_log")
def test_a_late_upload_leaves_the_next_attempts_log_alone(stack: StackUnderTest, airflow: Airflow) -> None:
    """The store stands still while the first attempt's log is sent, until the second attempt is under way:
    both logs are in the store in the end."""
    run_id = airflow.trigger(DAG_ID)
    minio = stack.container("minio")
    assert run("docker", "pause", minio).code == 0
    try:
        wait_until(lambda: second_runs(airflow, run_id), 60, "the second attempt is under way")
    finally:
        assert run("docker", "unpause", minio).code == 0
    assert airflow.follow(DAG_ID, run_id, patience=120) == "success"
    for attempt in (1, 2):
        wait_until(
            lambda number=attempt: (
                f"words of attempt {number}" in airflow.task_log(DAG_ID, run_id, "it", attempt=number)
            ),
            60,
            f"the log of attempt {attempt}",
        )
    # Taken from the store: what is left here is empty, for the worker to clear away.
    wait_until(lambda: local_logs(stack, run_id) in (["0", "0"], []), 60, "the local copies are empty")


def second_runs(airflow: Airflow, run_id: str) -> bool:
    """Whether the second attempt has begun."""
    (instance,) = airflow.task_instances(DAG_ID, run_id)
    return instance["try_number"] == 2 and instance["state"] == "running"


def local_logs(stack: StackUnderTest, run_id: str) -> list[str]:
    """Sizes of the log files of a run in the worker."""
    told = stack.exec(WORKER, "find", f"{LOGS}/dag_id={DAG_ID}/run_id={run_id}", "-type", "f", "-printf", "%s\n")
    return told.output.split()


def test_old_empty_logs_are_cleared_away(stack: StackUnderTest) -> None:
    """By a worker that starts, as by each one every hour: files and folders that are empty and of the day
    before. A log that was not uploaded stays, and so does a new one."""

    def in_logs(command: str) -> str:
        return stack.exec(WORKER, "sh", "-c", f"cd {LOGS} && {command}").output

    in_logs("mkdir -p old/run old/empty && touch old/run/log new && echo kept > old/kept")
    in_logs("touch -d '2 days ago' old/run/log old/kept old/empty")
    assert run("docker", "restart", stack.container(WORKER)).code == 0
    wait_until(lambda: "log" not in in_logs("ls old/run"), 60, "the old log is cleared away")
    assert in_logs("ls -d new old/*").split()[:2] == ["new", "old/kept"]
    assert "old/empty" not in in_logs("ls -d old/*")
    in_logs("rm -r new old")
    wait_until(lambda: stack.inspect(WORKER)["State"]["Health"]["Status"] == "healthy", 120, "a healthy worker")
