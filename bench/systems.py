"""The two sides of the benchmark: this stack, and the official settings (bench/peer/).

Both run on the same images, the same DAG folder and the same machine, in turn. Each is a Compose
project of its own, with its own ports and volumes, and is deleted when the benchmark ends.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg2

from stack import compose
from stack.airflow import Airflow
from stack.compose import Compose
from stack.errors import Exit, StackError
from stack.instance import ROOT, VAR, Instance
from stack.process import capture

HERE = Path(__file__).resolve().parent
WORK = VAR / "bench"
DAGS = WORK / "dags"
OURS, PEER, PEER_MLFLOW = "mlstack-bench", "mlstack-bench-peer", "mlstack-bench-peer-mlflow"
START_S, STOP_S = 900, 720
QUIET, QUIET_FOR_S = 0.1, 5
"""Cores that something which is healthy and idle stays below, and for how long."""
SECRET = "benchmark"
"""The peer's passwords. It lives for minutes, on loopback."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fresh_dags() -> None:
    """The DAG folder of both sides, as it ships."""
    shutil.rmtree(DAGS, ignore_errors=True)
    shutil.copytree(HERE / "dags", DAGS, ignore=shutil.ignore_patterns("__pycache__"))
    # Part of the image's identity: the same image, then, as this clone's.
    shutil.copy(ROOT / "dags/requirements.txt", DAGS)
    shutil.copytree(ROOT / "dags/environments", DAGS / "environments", dirs_exist_ok=True)


@dataclass(frozen=True)
class Usage:
    """What a project's containers take."""

    cpu_s: float
    """Since they started."""
    memory: int
    """Bytes of anonymous and of shared memory (Postgres's buffers, files in /tmp); page cache left out."""
    by_service: dict[str, tuple[float, int]]

    def mib(self) -> dict[str, float]:
        """Memory of each service in MiB."""
        return {name: round(used / 2**20, 1) for name, (_, used) in self.by_service.items()}


def usage(project: str, service: str = "") -> Usage:
    """CPU and memory of a project's running containers, or of one service's, from the engine's own accounting."""
    found: dict[str, tuple[float, int]] = {}
    transport = httpx.HTTPTransport(uds="/var/run/docker.sock")
    with httpx.Client(transport=transport, base_url="http://engine", timeout=30) as engine:
        for one in compose.containers(project):
            if one.state != "running" or service not in ("", one.service):
                continue
            answer = engine.get(f"/containers/{one.id}/stats", params={"stream": "false", "one-shot": "true"})
            told: dict[str, Any] = answer.raise_for_status().json()
            memory = told["memory_stats"].get("stats", {})
            # As the kernel lists them, shared memory among them; with cgroup v1 the sums have names of their own.
            total = "total_" if "total_active_anon" in memory else ""
            used = sum(int(memory[f"{total}{kind}_anon"]) for kind in ("active", "inactive"))
            found[one.service] = (told["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9, used)
    return Usage(sum(cpu for cpu, _ in found.values()), sum(memory for _, memory in found.values()), found)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """For the one benchmark of this machine: another one would delete its containers. Raises StackError."""
    with socket.socket(socket.AF_UNIX) as held:
        try:
            # A name without a file: it is free again when this process has ended, however that was.
            held.bind(f"\0{OURS}")
        except OSError as error:
            raise StackError(
                "E-BENCH",
                "another `make bench` or `make growth` runs on this machine",
                why="both would use the same containers, and each would slow the other down",
                fix="wait for it, or end it",
            ) from error
        yield


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """Where a benchmark works: nothing is there before it, and nothing is left."""
    with only_one():
        clean()
        try:
            yield
        finally:
            try:
                clean()
            finally:
                shutil.rmtree(WORK, ignore_errors=True)


def clean() -> None:
    """Deletes all sides, also what a run left that was ended by force: beside it nothing is measured."""
    with contextlib.ExitStack() as each:
        # The last one first: it is on the network of the first. One that fails does not keep the others.
        for project in (OURS, PEER, PEER_MLFLOW):
            each.callback(compose.remove_project, project)


def settled(project: str) -> None:
    """Returns when a project's containers are quiet: what is healthy may still be starting, and take from what is
    measured beside it. Raises StackError after START_S."""
    deadline = time.monotonic() + START_S
    before = usage(project).cpu_s
    while time.monotonic() < deadline:
        time.sleep(QUIET_FOR_S)
        after = usage(project).cpu_s
        if after - before < QUIET * QUIET_FOR_S:
            return
        before = after
    raise StackError(
        "E-BENCH",
        f"{project} still takes more than {QUIET} of a core after {START_S} s",
        why="what is measured beside it would be slower for it",
        fix="`docker stats` names the container",
        exit_code=Exit.TIMED_OUT,
    )


class Side:
    """One of the two: how it starts and stops, and where its API is."""

    name: str
    project: str

    def up(self) -> float:
        """Seconds until everything is healthy."""
        raise NotImplementedError

    def down(self) -> None:
        """Stops it; data is kept."""
        raise NotImplementedError

    def airflow(self) -> Airflow:
        """Its API, with a login."""
        raise NotImplementedError

    def address(self, service: str) -> str:
        """A container's address on our back-end network: from the host the object store is reached only there, and
        what is compared with it is reached likewise, not through the engine's proxy of a published port."""
        (name,) = [one.name for one in compose.containers(self.project) if one.service == service]
        network = f'{{{{(index .NetworkSettings.Networks "{OURS}_backend").IPAddress}}}}'
        return capture(["docker", "inspect", "--format", network, name], timeout=30).out.strip()


class Ours(Side):
    """This stack, by its own `make up`."""

    name, project = "ours", OURS

    def __init__(self) -> None:
        self.instance = Instance(WORK / "ours")
        self.ports = (free_port(), free_port())

    def _program(self, name: str, *words: str, timeout: float) -> float:
        started = time.monotonic()
        capture(
            [sys.executable, ROOT / "scripts" / name, *words],
            timeout=timeout,
            env={"STACK_DIR": str(self.instance.directory)},
        )
        return time.monotonic() - started

    def init(self) -> None:
        """Its directory, settings, secrets and plan."""
        self.instance.directory.mkdir(parents=True, exist_ok=True)
        self.instance.settings_file.write_text(
            f"STACK_NAME={OURS}\nAIRFLOW_PORT={self.ports[0]}\nMLFLOW_PORT={self.ports[1]}\nDAGS_DIR={DAGS}\n"
        )
        self._program("init.py", timeout=120)

    def up(self) -> float:
        self.init()
        return self._program("up.py", timeout=START_S)

    def down(self) -> None:
        self._program("down.py", timeout=STOP_S)

    def images(self) -> dict[str, str]:
        """The tags of the images that this clone's sources make."""
        return {name: tag for name, tag in self.compose.values.items() if name.endswith("_TAG")}

    def secret(self, name: str) -> str:
        """One of its generated secrets."""
        return (self.instance.secrets / name).read_text(encoding="utf-8").strip()

    def database(self, role: str) -> Any:
        """A connection to a role's own database, with its login."""
        password = self.secret(f"{role}_db_password")
        return psycopg2.connect(host=self.address("postgres"), user=role, dbname=role, password=password)

    def airflow(self) -> Airflow:
        return Airflow(f"http://localhost:{self.ports[0]}", "admin", self.secret("admin_password"))

    def python_alone(self, *, fibonacci: int, times: int) -> float:
        """Seconds of the chain's work in one Python process of the worker's container: no platform at all."""
        code = f"f = lambda n: n if n < 2 else f(n - 1) + f(n - 2)\nfor _ in range({times}): f({fibonacci})"
        started = time.monotonic()
        capture(["docker", "exec", self.compose.container("airflow-worker").name, "python3", "-c", code], timeout=900)
        return time.monotonic() - started

    @property
    def compose(self) -> Compose:
        """Its containers."""
        return Compose(self.instance)


class Composed(Side):
    """A peer: a Compose file beside ours, with our image names in its variables."""

    file: str

    def __init__(self, ours: Ours) -> None:
        self.ours = ours

    def variables(self) -> dict[str, str]:
        """What its Compose file refers to."""
        raise NotImplementedError

    def _compose(self, *words: str, timeout: float) -> None:
        capture(
            ["docker", "compose", "--file", HERE / "peer" / self.file, *words],
            timeout=timeout,
            env={**self.ours.compose.values, **self.variables()} | {"COMPOSE_FILE": "", "COMPOSE_PROFILES": ""},
        )

    def up(self) -> float:
        started = time.monotonic()
        self._compose("--project-name", self.project, "up", "--detach", "--wait", timeout=START_S)
        return time.monotonic() - started

    def down(self) -> None:
        self._compose("--project-name", self.project, "down", timeout=STOP_S)


class OfficialAirflow(Composed):
    """Airflow with the settings of its official docker-compose.yaml."""

    name, project, file = "peer", PEER, "airflow.yaml"

    def __init__(self, ours: Ours) -> None:
        super().__init__(ours)
        self.port = free_port()

    def variables(self) -> dict[str, str]:
        return {"BENCH_PEER": PEER, "BENCH_PEER_SECRET": SECRET, "BENCH_PEER_PORT": str(self.port)}

    def airflow(self) -> Airflow:
        return Airflow(f"http://localhost:{self.port}", "admin", SECRET)


class DefaultMlflow(Composed):
    """`mlflow server` with its defaults, on our running Postgres and MinIO."""

    project, file = PEER_MLFLOW, "mlflow.yaml"

    def variables(self) -> dict[str, str]:
        return {
            "BENCH_PEER_MLFLOW": PEER_MLFLOW,
            "BENCH_BACKEND_URL": self.ours.secret("mlflow_backend_url") + "?options=-csearch_path%3Dpeer",
            "BENCH_S3_SECRET": self.ours.secret("mlflow_s3_secret"),
        }
