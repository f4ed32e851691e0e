"""What is measured of Airflow. Each workload does the same work on both sides and says what it did."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bench.systems import DAGS, usage
from stack.airflow import Airflow
from stack.errors import Exit, StackError

PATIENCE_S = 900
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    value: float
    work: str
    """What was done, to be equal on both sides: a ratio of different work is none."""
    details: dict[str, Any] = field(default_factory=dict)


Measure = Callable[[Airflow], Sample]


def moment(text: str) -> float:
    """Seconds since 1970 of an API's time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def run_dag(airflow: Airflow, dag_id: str, conf: dict[str, Any] | None = None) -> tuple[float, Counter[str]]:
    """Runs a DAG; seconds from the trigger to its end, and how many instances ended in which state."""
    airflow.wait_for_dag(dag_id, patience=PATIENCE_S)
    airflow.set_paused(dag_id, False)
    asked = time.time()
    run_id = airflow.trigger(dag_id, conf)
    state = airflow.follow(dag_id, run_id, patience=PATIENCE_S)
    run = airflow.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")
    if state != "success":
        raise StackError(
            "E-BENCH",
            f"the run of {dag_id} ended as {state}",
            why="a run that failed did other work than one that did not",
            fix="see its logs in the side's web pages",
            exit_code=Exit.FAILED,
        )
    states = Counter(str(one["state"]) for one in airflow.task_instances(dag_id, run_id))
    return moment(run["end_date"]) - asked, states


def dag(dag_id: str, conf: dict[str, Any] | None = None, *, warm: bool = True) -> Measure:
    """Seconds of a DAG's run, as the trigger's author sees them; with `warm` the second of two runs."""

    def measure(airflow: Airflow) -> Sample:
        if warm:
            run_dag(airflow, dag_id, conf)
        seconds, states = run_dag(airflow, dag_id, conf)
        return Sample(seconds, ", ".join(f"{count} {state}" for state, count in sorted(states.items())))

    return measure


def idle(seconds: float) -> Callable[..., dict[str, Sample]]:
    """CPU and memory of a side that has nothing to do, over a while."""

    def measure(*projects: str) -> dict[str, Sample]:
        before, started = usage(*projects), time.monotonic()
        # The one sleep that is the work itself.
        time.sleep(seconds)
        after, took = usage(*projects), time.monotonic() - started
        cores = {
            name: round((after.by_service[name][0] - before.by_service.get(name, (0.0, 0))[0]) / took, 4)
            for name in after.by_service
        }
        memory = {name: round(used / MIB, 1) for name, (_, used) in after.by_service.items()}
        return {
            "idle_cpu": Sample(sum(cores.values()), "idle", {"cores": cores}),
            "idle_memory": Sample(after.memory / MIB, "idle", {"MiB": memory}),
        }

    return measure


def memory_now(project: str) -> Sample:
    """MiB now: after whatever ran before."""
    now = usage(project)
    each = {name: round(used / MIB, 1) for name, (_, used) in now.by_service.items()}
    return Sample(now.memory / MIB, "after the runs before", {"MiB": each})


def trigger_to_start(samples: int) -> Measure:
    """Seconds from the trigger to the task's start, the system being idle. The median of some."""

    def measure(airflow: Airflow) -> Sample:
        airflow.wait_for_dag("bench_one", patience=PATIENCE_S)
        airflow.set_paused("bench_one", False)
        found = []
        for number in range(samples + 1):
            # Idle again, and not in step with the scheduler's loop.
            time.sleep(2 + 0.37 * (number % 5))
            asked = time.time()
            run_id = airflow.trigger("bench_one")
            airflow.follow("bench_one", run_id, patience=PATIENCE_S)
            (instance,) = airflow.task_instances("bench_one", run_id)
            found.append(moment(instance["start_date"]) - asked)
        # The first one warms up.
        return Sample(statistics.median(found[1:]), f"{samples} triggers", {"each": [round(x, 3) for x in found]})

    return measure


def edits(files: int) -> Measure:
    """Seconds from the edit of many DAG files to the moment when the API shows the last one."""
    text = (
        "from airflow.sdk import dag, task\n\n"
        '@dag(dag_id="bench_edit_{number:03}", tags=["{tag}"])\ndef made():\n    @task\n    def nothing():\n'
        "        pass\n    nothing()\n\nmade()\n"
    )

    def write(tag: str) -> float:
        for number in range(files):
            (DAGS / f"bench_edit_{number:03}.py").write_text(text.format(number=number, tag=tag))
        return time.time()

    def visible(airflow: Airflow, tag: str) -> int:
        found = airflow.call("GET", "/dags", params={"tags": tag, "limit": 1})
        return int(found["total_entries"])

    def until(airflow: Airflow, tag: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (seen := visible(airflow, tag)) < files:
            if time.monotonic() > deadline:
                raise StackError(
                    "E-BENCH",
                    f"{seen} of {files} edited DAG files were visible after {PATIENCE_S} s",
                    why="the DAG processor did not read them in time",
                    fix="see the DAG processor's log",
                    exit_code=Exit.TIMED_OUT,
                )
            time.sleep(0.2)

    def measure(airflow: Airflow) -> Sample:
        stamp = f"{time.time():.0f}"
        write(f"old{stamp}")
        until(airflow, f"old{stamp}")
        edited = write(f"new{stamp}")
        until(airflow, f"new{stamp}")
        return Sample(time.time() - edited, f"{files} files")

    return measure
