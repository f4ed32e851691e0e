"""make storm: hungry tasks beside modest ones, on the running stack; prints what became of each.

One round is 12 tasks that take 20 MiB and sleep 40 s, beside 4 that grow by 16 MiB every 50 ms up to
6.4 GB, none of them retried. It is good when the 12 succeed, the 4 fail with an explanation in their
logs, the kernel killed nothing, no WorkerLostError was logged and the worker did not restart. Every
fifth round is measured against a run without the hungry ones.

Changes: puts a DAG file (tests/faults/memory_dags.py) into your DAG folder and removes it, with its
runs, at the end. It loads the worker heavily on purpose: not beside work that matters.
Exit: 0 every round was good, 1 one was not, 3 no stack, 4 a run did not end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stack import connect, instance
from stack.airflow import Airflow
from stack.compose import Compose
from stack.console import Step, say
from stack.errors import Exit, StackError, run_main
from stack.instance import ROOT
from stack.process import capture

SOURCE = ROOT / "tests/faults/memory_dags.py"
DAG_ID = "fault_storm"
WORKER = "airflow-worker"
PATIENCE_S = 900


@dataclass(frozen=True)
class Worker:
    """What must not change during a round."""

    started: str
    restarts: int
    oom_kills: int


@dataclass(frozen=True)
class Round:
    """What a run of the storm came to."""

    seconds: float
    succeeded: int
    explained: int
    unexplained: int
    oom_kills: int
    worker_lost: int
    restarted: bool

    def good(self, sleepers: int, hungry: int) -> bool:
        """Whether it is what was promised."""
        counts = (self.succeeded, self.explained, self.unexplained, self.oom_kills, self.worker_lost)
        return counts == (sleepers, hungry, 0, 0, 0) and not self.restarted


def worker_now(stack: Compose) -> Worker:
    """The worker's container now: since when, how often restarted, kernel OOM kills in it."""
    name = stack.container(WORKER).name
    found = json.loads(capture(["docker", "inspect", name], timeout=30).out)[0]
    script = "import dataclasses, json; from taskguard import linux; print(linux.container().oom_kills)"
    kills = capture(["docker", "exec", name, "python3", "-c", script], timeout=60).out
    return Worker(found["State"]["StartedAt"], found["RestartCount"], int(kills))


def lost(stack: Compose, since: float) -> int:
    """WorkerLostErrors in the worker's log."""
    told = capture(["docker", "logs", "--since", str(int(since)), stack.container(WORKER).name], timeout=60)
    return sum("raised error: WorkerLostError" in line for line in (told.out + told.err).splitlines())


@contextlib.contextmanager
def dags_in_place(folder: Path) -> Iterator[None]:
    """The storm's DAG file in a DAG folder, for a while."""
    target = folder / SOURCE.name
    if target.exists():
        raise StackError(
            "E-STORM",
            f"{target} is there already",
            why="an earlier storm was interrupted, or another one runs on this folder",
            fix=f"remove it: rm {target}",
        )
    shutil.copy(SOURCE, target)
    try:
        yield
    finally:
        target.unlink(missing_ok=True)


def run(airflow: Airflow, sleepers: int, hungry: int, seconds: int) -> tuple[float, str]:
    """One run: how long it took, and its id."""
    started = time.monotonic()
    run_id = airflow.trigger(DAG_ID, {"sleepers": sleepers, "hungry": hungry, "seconds": seconds})
    with Step(f"{sleepers} modest and {hungry} hungry tasks") as progress:

        def show(instances: list[dict[str, object]]) -> None:
            states = [str(one["state"]) for one in instances if str(one["task_id"]) in ("modest", "hungry")]
            progress.update(", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))

        airflow.follow(DAG_ID, run_id, patience=PATIENCE_S, on_progress=show)
    return time.monotonic() - started, run_id


def one_round(stack: Compose, airflow: Airflow, sleepers: int, hungry: int, seconds: int) -> Round:
    """Runs the storm once and looks at everything that must hold."""
    before, since = worker_now(stack), time.time()
    took, run_id = run(airflow, sleepers, hungry, seconds)
    after = worker_now(stack)
    instances = airflow.task_instances(DAG_ID, run_id)
    explained = unexplained = 0
    for one in instances:
        if one["state"] == "failed":
            logs = [
                airflow.task_log(DAG_ID, run_id, str(one["task_id"]), map_index=int(one["map_index"]), attempt=attempt)
                for attempt in range(1, int(one["try_number"]) + 1)
            ]
            if one["task_id"] == "hungry" and all("Out of memory: this task" in log for log in logs):
                explained += 1
            else:
                unexplained += 1
    return Round(
        seconds=round(took, 1),
        succeeded=sum(one["task_id"] == "modest" and one["state"] == "success" for one in instances),
        explained=explained,
        unexplained=unexplained,
        oom_kills=after.oom_kills - before.oom_kills,
        worker_lost=lost(stack, since),
        restarted=(before.started, before.restarts) != (after.started, after.restarts),
    )


def main(argv: Sequence[str]) -> int:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(prog="make storm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sleepers", type=int, default=12)
    parser.add_argument("--hungry", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=40, help="how long a modest task sleeps")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args(argv)
    shape = (arguments.sleepers, arguments.hungry)
    here = instance.current()
    stack = Compose(here)
    airflow, chosen = connect.airflow(here)
    rounds: list[Round] = []
    alone: list[float] = []
    with airflow, dags_in_place(connect.dags_folder(chosen)):
        airflow.wait_for_dag(DAG_ID)
        airflow.set_paused(DAG_ID, False)
        try:
            print(
                f"{'round':>5} {'s':>7} {'ok':>4} {'explained':>10} {'else':>5} {'oom':>4} {'lost':>5} {'restart':>8}"
            )
            for number in range(1, arguments.rounds + 1):
                if number % 5 == 1:
                    alone.append(run(airflow, arguments.sleepers, 0, arguments.seconds)[0])
                made = one_round(stack, airflow, *shape, arguments.seconds)
                rounds.append(made)
                print(
                    f"{number:>5} {made.seconds:>7.1f} {made.succeeded:>4} {made.explained:>10} {made.unexplained:>5} "
                    f"{made.oom_kills:>4} {made.worker_lost:>5} {'yes' if made.restarted else 'no':>8}",
                    flush=True,
                )
        finally:
            airflow.delete_dag(DAG_ID)
    good = sum(one.good(*shape) for one in rounds)
    ratio = statistics.median(one.seconds for one in rounds) / statistics.median(alone)
    worker = stack.container(WORKER).name
    limit = int(capture(["docker", "inspect", "--format", "{{.HostConfig.Memory}}", worker], timeout=30).out) // 2**20
    say(f"worker limit {limit} MiB: {good} of {len(rounds)} rounds good; {ratio:.2f} x the time without hungry tasks")
    if arguments.json:
        figures = {"limit": limit, "good": good, "ratio": ratio, "alone": alone, "rounds": [asdict(r) for r in rounds]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return Exit.DONE if good == len(rounds) else Exit.FAILED


if __name__ == "__main__":
    run_main(main)
