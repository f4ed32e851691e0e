"""What a task that does nothing costs beyond itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from bench.workloads import moment
from stack.airflow import Airflow
from tests.support import StackUnderTest, dag_file, run, wait_until

DAG_ID = "bench_fan_out"
TASKS = 20
HEARTBEAT_S = 5
"""Airflow's min_heartbeat_interval, which this project leaves alone."""
FREED = re.compile(r"(?P<when>\S+) .*Workload finished .*workload_id=(?P<id>\S+)")
"""What a pool process writes when it can take another task."""


@dataclass(frozen=True)
class Fan:
    """A run of small tasks that has ended."""

    ended: dict[str, float]
    """When each of its task instances ended, by id: seconds since 1970."""
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
        ended = {one["id"]: moment(one["end_date"]) for one in instances}
        yield Fan(ended, min(one["queued_when"] for one in instances))


def words(stack: StackUnderTest, service: str, fan: Fan) -> list[str]:
    """What a service wrote since the run began."""
    return run("docker", "logs", "--since", fan.since, stack.container(service)).output.splitlines()


def test_a_slot_is_free_when_its_task_has_ended(stack: StackUnderTest, fan: Fan) -> None:
    """Airflow's supervisor looks for the end once its task's streams are closed, and next after the
    interval between two heartbeats: the guard keeps one of them open until the end can be seen."""

    def freed() -> dict[str, float]:
        found = (FREED.match(line) for line in words(stack, "airflow-worker", fan))
        return {one["id"]: moment(one["when"]) for one in found if one and one["id"] in fan.ended}

    seen = wait_until(lambda: len(freed()) == TASKS + 1 and freed(), 30, "every task's pool process is free")
    held = {one: seen[one] - ended for one, ended in fan.ended.items()}
    assert max(held.values()) < HEARTBEAT_S / 2, held


def test_a_short_task_sends_no_heartbeat(stack: StackUnderTest, fan: Fan) -> None:
    """The API server knows of its start; the first heartbeat comes after the interval."""
    asked = [line for line in words(stack, "airflow-apiserver", fan) if any(one in line for one in fan.ended)]
    assert sum("/run " in line for line in asked) == TASKS + 1
    assert [line for line in asked if "/heartbeat" in line] == []
