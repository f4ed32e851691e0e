"""make bench: this stack and the official settings in turn, on this machine, in one run.

Each round starts both from empty volumes and gives them the same work; the table says medians,
ranges and ratios. QUICK=1 does a little of everything once, to see that it runs; its figures mean
nothing. Load on the machine is heavy on purpose: not beside work that matters.

Changes: nothing of a running stack. Its own two Compose projects and var/bench are deleted at the end.
Writes: the figures (--json) and the picture (--picture), after each round, only what was measured.
Exit: 0 everything could be run, 1 a workload could not.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench import report, workloads
from bench.report import Measured, Workload
from bench.systems import WORK, DefaultMlflow, OfficialAirflow, Ours, Side, clean, fresh_dags, settled, workplace
from bench.tracking import Store, Tracking
from bench.workloads import MIB, Measure, Sample
from stack.airflow import Airflow
from stack.console import Step, say
from stack.errors import Exit, run_main
from stack.instance import ROOT, VAR
from stack.process import capture

WORKLOADS = {
    "cold_start": Workload("empty volumes to healthy", "s", 0.55),
    "warm_start": Workload("volumes kept, to healthy", "s", 0.55),
    "idle_cpu": Workload("idle CPU", "cores", 0.13),
    "idle_memory": Workload("idle memory (peer: with MLflow)", "MiB", 0.5),
    "trigger_to_start": Workload("trigger to start, idle", "s", 0.33),
    "fan_out": Workload("fan-out of mapped no-op tasks", "s", 0.33),
    "chain": Workload("chain of 20 no-op tasks", "s", 0.25),
    "small_cpu": Workload("40 small CPU tasks in a row", "s", 0.33),
    "large_cpu": Workload("10 large CPU tasks in a row", "s", 1.0, floor="Python alone"),
    "memory_after": Workload("memory after the runs above (peer: with MLflow)", "MiB", 0.5),
    "edits": Workload("DAG files edited until visible", "s", 1.0),
    "load_run": Workload("10 minutes of load: a run at its end", "s", 1.0),
    "load_memory": Workload("10 minutes of load: memory added", "%", 5, against="alone"),
    "log_batch": Workload("MLflow: batches of 100 metrics", "1/s", 1.3, more_is_better=True),
    "create_run": Workload("MLflow: runs created", "1/s", 1.3, more_is_better=True),
    "search": Workload("MLflow: searches of 100 runs", "1/s", 1.3, more_is_better=True),
    "mlflow_memory": Workload("MLflow: memory after these", "MiB", 0.5),
}
RESULTS = VAR / "results"
ARTIFACTS = {"1MB": 10**6, "100MB": 10**8, "2GB": 2 * 10**9}


def _artifact(way: str, size: str) -> Workload:
    title, floor = f"MLflow: {size} {way}", "the object store itself"
    if size == "1MB":
        # All request and no transfer: there the other server is the measure.
        return Workload(title, "MB/s", 1.0, more_is_better=True, floor=floor)
    return Workload(title, "MB/s", 0.7, more_is_better=True, against="floor", floor=floor)


WORKLOADS |= {f"{way}_{size}": _artifact(way, size) for size in ARTIFACTS for way in ("up", "down")}
WORKLOADS["artifact_memory"] = Workload("MLflow: memory added by 2 GB up, down", "MiB", 100, against="alone")
MLFLOW = {"log_batch", "create_run", "search", "mlflow_memory", "artifact_memory"} | {
    name for name in WORKLOADS if name.startswith(("up_", "down_"))
}
"""For these the peer is `mlflow server`; its Airflow is not needed."""
RATES = ("create_run", "log_batch", "search")
WHOLE_STACK = {"idle_memory", "memory_after"}
"""Of these `mlflow server` is a part, beside the peer's Airflow."""


FIRST_ROUND = {"edits", "load_run", "load_memory"}
"""Measured in one round: they take minutes, and the peer looks for new files every five."""
WARMING = {"trigger_to_start", "fan_out", "chain"}
"""After these the worker and the API server are warm."""


def brief(error: BaseException) -> str:
    """The first line of it, without where this clone lies."""
    return (str(error).splitlines() or [type(error).__name__])[0].replace(f"{ROOT}/", "")


T = TypeVar("T")


def in_turn(them: list[T], number: int) -> list[T]:
    """Another one first in each round."""
    return them[number % len(them) :] + them[: number % len(them)]


class Bench:
    """The rounds, and what they found."""

    def __init__(self, *, quick: bool, only: set[str]) -> None:
        self.quick = quick
        # "After these" is after something.
        only = only | (set(RATES) if "mlflow_memory" in only else set())
        only = only | (WARMING if "memory_after" in only else set())
        self.measured = {name: Measured() for name in WORKLOADS if not only or name in only}
        self.ours = Ours()
        self.peer = OfficialAirflow(self.ours)
        self.peer_mlflow = DefaultMlflow(self.ours)
        self._peer_mlflow_idle: list[float] = []
        self.images: dict[str, str] = {}
        self.commit, self.sources = commit(), sources()
        fan = 20 if quick else 200
        self.airflow: dict[str, Measure] = {
            "trigger_to_start": workloads.trigger_to_start(1 if quick else 10),
            "fan_out": workloads.dag("bench_fan_out", {"tasks": fan}, warm=not quick),
            "chain": workloads.dag("bench_chain", warm=not quick),
            # The worker is warm by now.
            "small_cpu": workloads.dag("bench_small_cpu", warm=False),
            "large_cpu": workloads.dag("bench_large_cpu", warm=False),
        }
        if quick:
            # The same code as the last.
            del self.airflow["chain"], self.airflow["small_cpu"]

    def _take(self, side: str, name: str, measure: Callable[[], Sample]) -> bool:
        """One sample; what could not be measured is told (and False), whatever it was, and the rest goes on."""
        if name not in self.measured:
            return True
        with Step(f"{side}: {WORKLOADS[name].title}"):
            try:
                sample = measure()
            except Exception as error:
                self.measured[name].problems.append(f"{side} failed: {brief(error)}")
                say(f"    failed: {error}")
                return False
        getattr(self.measured[name], side).append(sample)
        return True

    def round(self, number: int) -> None:
        """Both sides once, the other one first in every second round. Nothing where the images are no longer those
        of the rounds before."""
        try:
            fresh_dags()
            # The peer takes our image names from here.
            self.ours.init()
            images = self.ours.images()
        except Exception as error:
            say(f"    failed: {error}")
            self._lacks(f"round {number + 1} failed: {brief(error)}", number)
            return
        self.images = self.images or images
        if (images, sources()) != (self.images, self.sources):
            problem = f"round {number + 1} failed: the sources were changed, it would measure another stack"
            say(f"    {problem}")
            self._lacks(problem, number)
            return
        sides: list[Side] = [self.ours, self.peer]
        for side in in_turn(sides, number):
            if side is self.peer and not set(self.measured) - MLFLOW:
                continue
            try:
                clean()
                fresh_dags()
                if self._one_side(side, number) and side is self.ours:
                    self._mlflow(number)
            except Exception as error:
                # Hours of measurements are not thrown away for what one side could not do.
                say(f"    {side.name} failed: {error}")
                self._lacks(f"{side.name} failed in round {number + 1}: {brief(error)}", number, side)

    def _lacks(self, problem: str, number: int, side: Side | None = None) -> None:
        """The workloads that have no figure of this round, by one side or by both, say why."""
        for name, found in self.measured.items():
            due = 1 if name in FIRST_ROUND else number + 1
            # MLflow is measured with our side, the peer's too.
            of = [side.name] if side and name not in MLFLOW else ["ours", "peer"]
            if min(len(getattr(found, one)) for one in of) < due and not (side is self.peer and name in MLFLOW):
                found.problems.append(problem)

    def _one_side(self, side: Side, number: int) -> bool:
        """Its Airflow's part; whether it came up."""
        if "cold_start" not in self.measured:
            with Step(f"{side.name}: start"):
                side.up()
        elif not self._take(side.name, "cold_start", lambda: Sample(side.up(), "start")):
            self._lacks(f"{side.name} failed in round {number + 1}: it did not start", number, side)
            return False
        if not self.quick and "warm_start" in self.measured:
            side.down()
            self._take(side.name, "warm_start", lambda: Sample(side.up(), "start"))
        with side.airflow() as airflow:
            airflow.wait_for_dag("bench_one", patience=600)
            if {"idle_cpu", "idle_memory"} & set(self.measured):
                with Step(f"{side.name}: idle, once its start is over"):
                    time.sleep(1 if self.quick else workloads.SETTLE_S)
                    found = workloads.idle(5 if self.quick else 120)(side.project)
                self._keep(side.name, found)
            if not WARMING & set(self.measured):
                workloads.run_dag(airflow, "bench_one")
            done = [
                name
                for name, measure in self.airflow.items()
                if name in self.measured and self._take(side.name, name, partial(measure, airflow))
            ]
            if not self.quick and "memory_after" in self.measured:
                # What can be given back has been.
                time.sleep(workloads.SETTLE_S)
            self._take(side.name, "memory_after", partial(workloads.memory_now, side.project, done))
            if side is self.ours:
                alone = partial(self.ours.python_alone, fibonacci=33, times=10)
                self._take("floor", "large_cpu", lambda: Sample(alone(), "10 success"))
            # The peer would look for new files in five minutes.
            if not number and (side is self.ours or not self.quick):
                self._first_round(side, airflow)
        return True

    def _first_round(self, side: Side, airflow: Airflow) -> None:
        """FIRST_ROUND."""
        edits = workloads.edits(2, 1) if self.quick else workloads.edits(50)
        self._take(side.name, "edits", partial(edits, airflow))
        if not {"load_run", "load_memory"} & set(self.measured):
            return
        load = (
            workloads.load(side.project, dags=2, tasks=1, minutes=1, settle=1)
            if self.quick
            else workloads.load(side.project, dags=100, tasks=5, minutes=10)
        )
        with Step(f"{side.name}: {'a moment' if self.quick else '10 minutes'} of load"):
            try:
                found = load(airflow)
            except Exception as error:
                for name in {"load_run", "load_memory"} & set(self.measured):
                    self.measured[name].problems.append(f"{side.name} failed: {brief(error)}")
                say(f"    failed: {error}")
                return
        self._keep(side.name, found)

    def _keep(self, side: str, found: dict[str, Sample]) -> None:
        for name in set(found) & set(self.measured):
            getattr(self.measured[name], side).append(found[name])

    def _mlflow(self, number: int) -> None:
        if not (MLFLOW | WHOLE_STACK) & set(self.measured):
            return
        ours, peer = self.ours, self.peer_mlflow
        with ours.database("mlflow") as connection, connection.cursor() as cursor:
            cursor.execute("CREATE SCHEMA IF NOT EXISTS peer")
        with Step("peer: MLflow"):
            peer.up()
            if not self.quick:
                settled(peer.project)
        servers = {
            "ours": Tracking(
                ours.address("mlflow"),
                # As tasks do: with a login whose permissions are asked for.
                ("airflow", ours.secret("mlflow_airflow_password")),
                ours.project,
            ),
            "peer": Tracking(peer.address("mlflow"), None, peer.project),
        }
        if WHOLE_STACK & set(self.measured):
            self._peer_mlflow_idle.append(servers["peer"].memory() / MIB)
        few = 8 if self.quick else 400
        for side, server in in_turn(list(servers.items()), number):
            calls = {
                # A run takes some milliseconds: fewer would be over before the machine has found its pace.
                "create_run": partial(server.create_run, 4 * few),
                "log_batch": partial(server.log_batch, few),
                "search": partial(server.search, few // 2),
            }
            done = [name for name in RATES if name in self.measured and self._take(side, name, calls[name])]
            self._take(side, "mlflow_memory", partial(server.memory_after, done))
        store = Store(ours.address("minio"), ours.secret("mlflow_s3_secret"))
        places: list[tuple[str, Tracking | Store]] = [*servers.items(), ("floor", store)]
        self._artifacts(in_turn(places, number))

    def _artifacts(self, places: list[tuple[str, Tracking | Store]]) -> None:
        """Each size through each, in turn: what the machine does meanwhile meets all of them."""
        for size, length in ARTIFACTS.items():
            up, down, memory = f"up_{size}", f"down_{size}", "artifact_memory"
            if self.quick and length > 10**6:
                continue
            whole = self.quick or length == max(ARTIFACTS.values())
            if not {up, down, *([memory] if whole else [])} & set(self.measured):
                continue
            file = artifact(length)
            for side, place in places:
                # What was written before is not to be written during this.
                os.sync()
                before = place.memory() if isinstance(place, Tracking) else 0
                if up not in self.measured:
                    place.upload(file)
                if not self._take(side, up, partial(place.upload, file)):
                    lacking = {down, *([memory] if whole and isinstance(place, Tracking) else [])}
                    for name in lacking & set(self.measured):
                        self.measured[name].problems.append(f"{side} failed: there was nothing to take down again")
                    continue
                self._take(side, down, partial(place.download, file))
                if isinstance(place, Tracking) and whole:
                    self._take(side, memory, partial(place.memory_added, file, before))
            file.unlink()

    def results(self) -> dict[str, Measured]:
        """What was measured so far. The peer's memory is Airflow's and MLflow's of a round together, as ours is."""
        found = dict(self.measured)
        for name in WHOLE_STACK & set(found):
            alone, extra = found[name], self._peer_mlflow_idle
            if not alone.peer:
                continue
            if len(alone.peer) != len(extra):
                problem = f"the peer's MLflow failed: measured in {len(extra)} rounds of {len(alone.peer)}"
                found[name] = replace(alone, problems=[*alone.problems, problem])
                continue
            peer = [
                Sample(one.value + more, one.work, {**one.details, "mlflow": more})
                for one, more in zip(alone.peer, extra, strict=True)
            ]
            found[name] = replace(alone, peer=peer)
        return found


def artifact(length: int) -> Path:
    """A file of that many bytes, which no compression makes smaller."""
    path = WORK / f"artifact-{length}"
    block = os.urandom(10**6)
    with path.open("wb") as file:
        for _ in range(length // len(block)):
            file.write(block)
    return path


def told(*words: str) -> str:
    """What a command prints, in the clone; nothing where it fails."""
    return capture(words, timeout=30, check=False, cwd=ROOT).out.strip()


def commit() -> str:
    """The clone's commit, with a plus where files were changed since."""
    changed = "+" if told("git", "status", "--porcelain", "--untracked-files=no") else ""
    return told("git", "rev-parse", "--short", "HEAD") + changed


def sources() -> str:
    """What either side is started from, and is in no image's tag."""
    folders = ("compose.yaml", "compose", "config", "scripts", "bench/peer", "bench/dags")
    return told("git", "ls-tree", "HEAD", *folders) + told("git", "diff", "HEAD", "--", *folders)


def about(rounds: int, images: dict[str, str], **more: object) -> dict[str, object]:
    """The machine, the versions, the day."""
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "date": datetime.now(tz=timezone.utc).isoformat(timespec="seconds"),
        "rounds": rounds,
        "cpus": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "memory_MiB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        "kernel": platform.release(),
        "engine": told("docker", "version", "--format", "{{.Server.Version}}"),
        "compose": told("docker", "compose", "version", "--short"),
        "python": platform.python_version(),
        "commit": commit(),
        "images": images,
        **more,
    }


def main(argv: Sequence[str]) -> int:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of a little of everything")
    parser.add_argument("--only", default="", help=f"some of: {' '.join(WORKLOADS)}")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench.json")
    parser.add_argument("--picture", type=Path, default=RESULTS / "bench.svg")
    arguments = parser.parse_args(argv)
    only = set(arguments.only.split())
    if only - set(WORKLOADS):
        parser.error(f"no such workload: {' '.join(sorted(only - set(WORKLOADS)))}")
    rounds = 1 if arguments.quick else max(1, arguments.rounds)
    bench = Bench(quick=arguments.quick, only=only)
    with workplace():
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            bench.round(number)
            facts = about(number + 1, bench.images, commit=bench.commit, quick=arguments.quick, only=sorted(only))
            found = bench.results()
            report.to_json(facts, WORKLOADS, found, arguments.json)
            arguments.picture.parent.mkdir(parents=True, exist_ok=True)
            arguments.picture.write_text(report.picture(facts, WORKLOADS, found) + "\n", encoding="utf-8")
        print(report.table({name: WORKLOADS[name] for name in found}, found), flush=True)
        say(f"wrote {arguments.json}, {arguments.picture}")
    if arguments.quick:
        say("a quick look: that it runs is all that it says")
    failed = [name for name, one in found.items() if any("failed" in problem for problem in one.problems)]
    return Exit.FAILED if failed else Exit.DONE


if __name__ == "__main__":
    run_main(main)
