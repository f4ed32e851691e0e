"""What a task that does nothing costs beyond itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from stack.airflow import Airflow
from tests.support import StackUnderTest, dag_file, run, wait_until

DAG_ID = "bench_fan_out"
TASKS = 20
HEARTBEAT_S = 5
"""Airflow's min_heartbeat_interval, which this project leaves alone."""


@dataclass(frozen=True)
class Fan:
    """A run of small tasks that has ended."""

    ids: list[str]
    """Of its task instances."""
    since: str
    """When the first one was queued: for `docker logs`."""


@pytest.fixture(scope="module")
def fan(stack: StackUnderTest, airflow: Airflow) -> Iterator[Fan]:
    with dag_file(stack, f"bench/dags/{DAG_ID}.py"):
        airflow.wait_for_dag(DAG_ID)
        airflow.set_paused(DAG_ID, False)
        run_id = airflow.trigger(DAG_ID, {"tasks": TASKS})
        assert airflow.follow(DAG_ID, run_id, patience=120) == "success"
        instances = airflow.task_instances(DAG_ID, run_id)
        assert len(instances) == TASKS + 1
        yield Fan([one["id"] for one in instances], min(one["queued_when"] for one in instances))


def words(stack: StackUnderTest, service: str, fan: Fan) -> list[str]:
    """What a service wrote since the run began."""
    return run("docker", "logs", "--since", fan.since, stack.container(service)).output.splitlines()


def test_a_slot_is_free_when_its_task_has_ended(stack: StackUnderTest, fan: Fan) -> None:
    """Airflow's supervisor looks for the end once its task's streams are closed, and next after the
    interval between two heartbeats: the guard keeps one of them open until the end can be seen."""

    def durations() -> list[float]:
        lines = [line for line in words(stack, "airflow-worker", fan) if any(one in line for one in fan.ids)]
        return [
            float(found[1]) for line in lines if (found := re.search(r"Workload finished .*duration=([\d.]+)", line))
        ]

    seen = wait_until(lambda: len(durations()) == TASKS + 1 and durations(), 30, "every task's pool process is free")
    assert max(seen) < HEARTBEAT_S, sorted(seen)


def test_a_short_task_sends_no_heartbeat(stack: StackUnderTest, fan: Fan) -> None:
    """The API server knows of its start; the first heartbeat comes after the interval."""
    asked = [line for line in words(stack, "airflow-apiserver", fan) if any(one in line for one in fan.ids)]
    assert sum("/run " in line for line in asked) == TASKS + 1
    assert [line for line in asked if "/heartbeat" in line] == []
