"""What is measured of Airflow. Each workload does the same work on both sides and says what it did."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bench.systems import DAGS, usage
from stack.airflow import Airflow
from stack.errors import Exit, StackError

PATIENCE_S = 900
SETTLE_S = 60
"""After a burst, until what can be given back has been."""
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    value: float
    work: str
    """What was done, to be equal on both sides: a ratio of different work is none."""
    details: dict[str, Any] = field(default_factory=dict)


Measure = Callable[[Airflow], Sample]


EDITED = (
    "from airflow.sdk import dag, task\n\n"
    '@dag(dag_id="{dag_id}", tags=["{tag}"])\ndef made():\n    @task\n    def nothing(number):\n'
    "        pass\n    for number in range({tasks}):\n        nothing(number)\n\nmade()\n"
)


def write_dags(prefix: str, files: int, *, tag: str, tasks: int = 1) -> list[str]:
    """DAG files with one DAG each, in the folder of both sides; their DAG ids."""
    dag_ids = [f"{prefix}_{number:03}" for number in range(files)]
    for dag_id in dag_ids:
        text = EDITED.format(dag_id=dag_id, tag=tag, tasks=tasks)
        (DAGS / f"{dag_id}.py").write_text(text, encoding="utf-8")
    return dag_ids


def until(count: Callable[[], int], wanted: int, what: str, why: str, look_every: float) -> None:
    """Waits until there are as many as wanted. Raises StackError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while (seen := count()) < wanted:
        if time.monotonic() > deadline:
            raise StackError(
                "E-BENCH",
                f"{seen} of {wanted} {what} after {PATIENCE_S} s",
                why=why,
                fix="see the side's logs, or find that it is what was to be found out",
                exit_code=Exit.TIMED_OUT,
            )
        time.sleep(look_every)


def until_visible(airflow: Airflow, tag: str, files: int) -> None:
    """Waits until the API shows that many DAGs with a tag."""

    def visible() -> int:
        return int(airflow.call("GET", "/dags", params={"tags": tag, "limit": 1})["total_entries"])

    until(visible, files, "DAG files were visible", "the DAG processor did not read them in time", 0.2)


def moment(text: str) -> float:
    """Seconds since 1970 of a time as APIs and logs have it; Python 3.10 does not read the Z."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def failed(what: str) -> StackError:
    """Runs that ended otherwise than they should have."""
    return StackError(
        "E-BENCH",
        what,
        why="a run that failed did other work than one that did not",
        fix="see its logs in the side's web pages",
        exit_code=Exit.FAILED,
    )


def follow(airflow: Airflow, dag_id: str, run_id: str, patience: float = PATIENCE_S) -> float:
    """Waits for a run; when it ended. Raises StackError where it failed."""
    state = airflow.follow(dag_id, run_id, patience=patience)
    if state != "success":
        raise failed(f"the run of {dag_id} ended as {state}")
    return moment(airflow.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["end_date"])


def run_dag(airflow: Airflow, dag_id: str, conf: dict[str, Any] | None = None) -> tuple[float, Counter[str]]:
    """Runs a DAG; seconds from the trigger to its end, and how many instances ended in which state."""
    airflow.wait_for_dag(dag_id, patience=PATIENCE_S)
    airflow.set_paused(dag_id, False)
    asked = time.time()
    run_id = airflow.trigger(dag_id, conf)
    ended = follow(airflow, dag_id, run_id)
    states = Counter(str(one["state"]) for one in airflow.task_instances(dag_id, run_id))
    return ended - asked, states


def dag(dag_id: str, conf: dict[str, Any] | None = None, *, warm: bool = True) -> Measure:
    """Seconds of a DAG's run, as the trigger's author sees them; with `warm` the second of two runs."""

    def measure(airflow: Airflow) -> Sample:
        if warm:
            run_dag(airflow, dag_id, conf)
        seconds, states = run_dag(airflow, dag_id, conf)
        return Sample(seconds, ", ".join(f"{count} {state}" for state, count in sorted(states.items())))

    return measure


def idle(seconds: float) -> Callable[[str], dict[str, Sample]]:
    """CPU and memory of a side that has nothing to do, over a while."""

    def measure(project: str) -> dict[str, Sample]:
        before, started = usage(project), time.monotonic()
        # The one sleep that is the work itself.
        time.sleep(seconds)
        after, took = usage(project), time.monotonic() - started
        cores = {
            name: round((after.by_service[name][0] - before.by_service.get(name, (0.0, 0))[0]) / took, 4)
            for name in after.by_service
        }
        return {
            "idle_cpu": Sample(sum(cores.values()), "idle", {"cores": cores}),
            "idle_memory": Sample(after.memory / MIB, "idle", {"MiB": after.mib()}),
        }

    return measure


def memory_now(project: str, done: Sequence[str]) -> Sample:
    """MiB now, after these runs."""
    now = usage(project)
    return Sample(now.memory / MIB, f"after {', '.join(done)}", {"MiB": now.mib()})


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
            follow(airflow, "bench_one", run_id)
            (instance,) = airflow.task_instances("bench_one", run_id)
            found.append(moment(instance["start_date"]) - asked)
        # The first one warms up.
        return Sample(statistics.median(found[1:]), f"{samples} triggers", {"each": [round(x, 3) for x in found]})

    return measure


def edits(files: int, times: int = 3) -> Measure:
    """Seconds from the edit of many DAG files to the moment when the API shows the last one. The median of some."""

    def measure(airflow: Airflow) -> Sample:
        stamp = f"{time.time():.0f}"
        found = []
        for number in range(times + 1):
            tag = f"edit{number}-{stamp}"
            write_dags("bench_edit", files, tag=tag)
            edited = time.time()
            until_visible(airflow, tag, files)
            found.append(time.time() - edited)
        # The first time the files are new.
        return Sample(statistics.median(found[1:]), f"{files} files", {"each": [round(x, 2) for x in found[1:]]})

    return measure


def load(
    project: str, *, dags: int, tasks: int, minutes: int, settle: float = SETTLE_S
) -> Callable[[Airflow], dict[str, Sample]]:
    """Each minute a run of every DAG, for a while: what memory that leaves behind, and how long a run takes
    at its beginning and at its end. Warmed up by one run of every DAG. Raises StackError where a run failed."""

    def ended(airflow: Airflow, dag_ids: list[str], runs: int) -> None:
        asked = {"dag_ids": dag_ids, "states": ["success", "failed"], "page_limit": 1}

        def count() -> int:
            return int(airflow.call("POST", "/dags/~/dagRuns/list", json=asked)["total_entries"])

        until(count, runs, "runs had ended", "the side does less than it is asked to", 1)

    def run_seconds(airflow: Airflow, triggered: list[tuple[str, str]]) -> tuple[list[float], Counter[str]]:
        runs = [airflow.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}") for dag_id, run_id in triggered]
        return (
            [moment(run["end_date"]) - moment(run["queued_at"]) for run in runs],
            Counter(str(run["state"]) for run in runs),
        )

    def measure(airflow: Airflow) -> dict[str, Sample]:
        tag = f"load{time.time():.0f}"
        dag_ids = write_dags("bench_load", dags, tag=tag, tasks=tasks)
        until_visible(airflow, tag, dags)
        with ThreadPoolExecutor(8) as pool:

            def trigger_all() -> list[tuple[str, str]]:
                return list(pool.map(lambda dag_id: (dag_id, airflow.trigger(dag_id)), dag_ids))

            list(pool.map(lambda dag_id: airflow.set_paused(dag_id, False), dag_ids))
            trigger_all()
            ended(airflow, dag_ids, dags)
            time.sleep(settle)
            before, started = usage(project), time.monotonic()
            triggered, late = [], []
            for minute in range(minutes):
                time.sleep(max(0.0, started + 60 * minute - time.monotonic()))
                late.append(round(time.monotonic() - started - 60 * minute, 1))
                triggered.append(trigger_all())
        ended(airflow, dag_ids, dags * (minutes + 1))
        took = time.monotonic() - started
        time.sleep(settle)
        after = usage(project)
        seconds, states = zip(*(run_seconds(airflow, one) for one in triggered), strict=True)
        all_states = dict(sum(states, Counter()))
        if set(all_states) != {"success"}:
            raise failed(f"of the load's runs ended: {all_states}")
        work = f"{minutes} x {dags} runs of {tasks} tasks"
        medians = [round(statistics.median(one), 2) for one in seconds]
        return {
            "load_memory": Sample((after.memory / before.memory - 1) * 100, work, {"MiB": [before.mib(), after.mib()]}),
            "load_run": Sample(
                medians[-1], work, {"median of each minute": medians, "late": late, "all in": round(took, 1)}
            ),
        }

    return measure
