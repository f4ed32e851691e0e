"""The stack under test, and how the tests look at it.

The throwaway stack is a copy of this work tree in a directory with a space in its name, started
with its own `make up` by a user who is not root (where we are root and can make one), interrupted
once on the way, with its own project name, ports and volumes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import psycopg2
import psycopg2.extensions
import pytest
from botocore.client import BaseClient
from botocore.config import Config

from stack import compose, settings
from stack.airflow import Airflow
from stack.compose import Compose
from stack.instance import ROOT, VAR, Instance
from stack.serving import Serving

PROJECT = "mlstack-test"
USER = "mlstack-test"
MEMORY = os.environ.get("STACK_MEMORY", "4544m")
"""What a host of 4 GiB leaves (3712), and Flower and serving: every other service is tried at its floor."""
WORKER_MEMORY = os.environ.get("WORKER_MEMORY", "1g")
"""Small: the memory tests are to overrun it. Other sizes by the variable of that name."""
WEEKLY = '"0 3 * * 1"'
"""When the shipped pipeline runs by itself."""
LOGS = VAR / "test" / "logs"
SCREENSHOTS = VAR / "test" / "screenshots"


@dataclass
class Run:
    """What a program said."""

    code: int
    output: str
    seconds: float


@dataclass
class StackUnderTest:
    """A stack, the clone that it was started from, and ways to look at it."""

    clone: Path
    user: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def instance(self) -> Instance:
        return Instance(self.clone)

    @property
    def compose(self) -> Compose:
        return Compose(self.instance)

    @property
    def settings(self) -> settings.Settings:
        return settings.load(self.instance.settings_file)

    def make(self, *words: str, timeout: float = 900, env: dict[str, str] | None = None) -> Run:
        """`make` in the stack's clone, as its user, without a terminal."""
        started = time.monotonic()
        child = self.start("make", "--no-print-directory", *words, env=env)
        try:
            output, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        return Run(child.returncode, output, time.monotonic() - started)

    def start(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A command in the clone, as its user, in a group of its own, without a terminal."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        variables |= env or {}
        command = [*words]
        if self.user:
            variables |= {"HOME": pwd.getpwnam(self.user).pw_dir, "USER": self.user}
            command = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups", *words]
        return subprocess.Popen(
            command,
            cwd=self.clone,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Ctrl-C is ignored in what a script started with `&`: the tests need it to be heard.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def secret(self, name: str) -> str:
        return (self.instance.secrets / name).read_text(encoding="utf-8").strip()

    def container(self, service: str) -> str:
        return next(one.name for one in self.compose.containers() if one.service == service)

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", self.container(service)).output)
        return found[0]

    def address(self, service: str) -> str:
        """The container's address on the back-end network, which the host itself can reach."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        return str(networks[f"{self.compose.project}_backend"]["IPAddress"])

    def database(self, role: str) -> psycopg2.extensions.connection:
        """A connection to a role's own database, with its login."""
        password = self.secret(f"{role}_db_password")
        return psycopg2.connect(host=self.address("postgres"), user=role, dbname=role, password=password)

    def exec(self, service: str, *words: str, timeout: float = 60) -> Run:
        return run("docker", "exec", self.container(service), *words, timeout=timeout)

    def python(self, service: str, code: str) -> Run:
        """Runs Python inside a service, with the variables that the service itself has."""
        return self.exec(service, "with-secrets", "python3", "-c", code)

    @property
    def airflow_url(self) -> str:
        return self.settings.airflow_url

    @property
    def mlflow_url(self) -> str:
        return self.settings.mlflow_url

    def s3(self, identity: str, secret: str | None = None) -> BaseClient:
        """The object store as one of its identities, with that one's own secret or another; asked once."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.address('minio')}:9000",
            aws_access_key_id=identity,
            aws_secret_access_key=secret or self.secret(f"{identity.replace('-', '_')}_s3_secret"),
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5),
        )

    def airflow(self) -> Airflow:
        return Airflow(self.airflow_url, self.settings.admin_user, self.secret("admin_password"))

    def serving(self) -> Serving:
        return Serving(self.settings.serving_url, self.secret("serving_token"))


def program(name: str) -> ModuleType:
    """One of the programs in Airflow's image that have no ending, as a module."""
    loader = SourceFileLoader(name.replace("-", "_"), str(ROOT / "dockerfiles/airflow" / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    # Its dataclasses look for their module there.
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def dag_file(stack: StackUnderTest, path: str) -> Iterator[None]:
    """A file of this repository is among the stack's DAGs, for a while."""
    target = stack.clone / "dags" / Path(path).name
    shutil.copy(ROOT / path, target)
    try:
        yield
    finally:
        target.unlink()


def run(*words: str, timeout: float = 120) -> Run:
    """A command and what it printed."""
    started = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False)
    return Run(done.returncode, done.stdout + done.stderr, time.monotonic() - started)


def wait_until(fact: Callable[[], Any], patience: float, what: str) -> Any:
    """Polls a fact until it is true; fails with what was last seen after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        seen = fact()
        if seen:
            return seen
        if time.monotonic() > deadline:
            pytest.fail(f"after {patience:g} s not yet: {what}; last seen: {seen!r}")
        time.sleep(0.2)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has, too)."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True


@contextlib.contextmanager
def hidden_folder(base: Path) -> Iterator[Path]:
    """A folder that exists, in one that this process may not look into for a while; root is nobody meanwhile."""
    hidden = base / "closed" / "hidden"
    hidden.mkdir(parents=True)
    hidden.parent.chmod(0)
    nobody = 65534 if os.geteuid() == 0 else os.geteuid()
    os.setresuid(nobody, nobody, -1)
    try:
        yield hidden
    finally:
        _, _, before = os.getresuid()
        os.setresuid(before, before, -1)
        hidden.parent.chmod(0o700)


def script(path: Path, body: str) -> None:
    """A shell script that can be run, in place of what is there: a link is not followed."""
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def throwaway(request: pytest.FixtureRequest) -> Iterator[StackUnderTest]:
    """Builds what is due, then starts the stack as the README says; deletes all of it at the end."""
    # Of whoever calls: with it the throwaway's commands would be about that stack.
    os.environ.pop("STACK_DIR", None)
    say = request.config.get_terminal_writer().line
    say(f"\nbuilding what is due, then starting a throwaway stack ({PROJECT})")
    remove_leftovers()
    # Here, and not by its own `make up`: with the mirrors of this clone's settings, and opt-in services' images, too.
    build = [sys.executable, ROOT / "scripts/build.py", "--all"]
    built = subprocess.run(build, check=False, stdin=subprocess.DEVNULL)
    assert built.returncode == 0, "the images could not be built (see above)"
    clone = copy_of_the_tree()
    put_off_the_weekly_run(clone)
    airflow_port, mlflow_port, flower_port, serving_port = free_ports(4)
    (clone / "stack.env").write_text(
        f"STACK_NAME={PROJECT}\nSTACK_MEMORY={MEMORY}\nWORKER_MEMORY={WORKER_MEMORY}\nAIRFLOW_PORT={airflow_port}\n"
        f"MLFLOW_PORT={mlflow_port}\nFLOWER=on\nFLOWER_PORT={flower_port}\n"
        f"SERVING=on\nSERVING_PORT={serving_port}\n"
    )
    found = StackUnderTest(clone, user=make_user(clone))
    try:
        interrupt_the_first_start(found)
        up = found.make("up")
        found.timings["up, images present, empty volumes (after an interrupted start)"] = up.seconds
        say(up.output)
        assert up.code == 0, up.output
        yield found
    finally:
        if request.session.testsfailed:
            keep_logs()
            say(f"logs of every service are in {LOGS}")
        remove_leftovers()


def copy_of_the_tree() -> Path:
    """A copy of what git tracks or would track, outside this clone, in a path with a space."""
    base = Path("/var/tmp") / f"{PROJECT}-{os.getpid()}"
    clone = base / "a fresh clone"
    names = run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard").output.splitlines()
    for name in names:
        source = ROOT / name
        if source.is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, clone / name)
    assert (clone / "Makefile").exists()
    return clone


def put_off_the_weekly_run(clone: Path) -> None:
    """To a day that no test reaches: one that begins between two tests takes the place of the run that the next one
    asks for, and waits for a person."""
    path = clone / "dags/train_model.py"
    shipped = path.read_text()
    assert shipped.count(WEEKLY) == 1
    in_three_days = datetime.now(tz=timezone.utc) + timedelta(days=3)
    path.write_text(shipped.replace(WEEKLY, f'"0 3 * * {in_three_days.isoweekday() % 7}"'))


def make_user(clone: Path) -> str | None:
    """As root: a user in the docker group, who owns the clone. Otherwise nobody but ourselves."""
    if os.geteuid() != 0 or shutil.which("useradd") is None or shutil.which("setpriv") is None:
        return None
    made = run("useradd", "--create-home", "--groups", "docker", "--shell", "/bin/sh", USER)
    assert made.code == 0, made.output
    run("chown", "-R", f"{USER}:", str(clone.parent))
    return USER


def interrupt_the_first_start(found: StackUnderTest) -> None:
    """`make up`, and Ctrl-C as soon as a container exists."""
    child = found.start("make", "--no-print-directory", "up")
    wait_until(
        lambda: child.poll() is not None or compose.containers(PROJECT), 180, "a first container of the throwaway stack"
    )
    os.killpg(child.pid, signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode != 0, f"an interrupted start must not end well:\n{output}"
    assert "interrupted" in output, output


def remove_leftovers() -> None:
    """Removes what an earlier test run left: only what carries the throwaway project's label or name."""
    label = f"label=com.docker.compose.project={PROJECT}"
    for kind, remove in (
        (("ps", "--all"), ("rm", "--force", "--volumes")),
        (("volume", "ls"), ("volume", "rm", "--force")),
        (("network", "ls"), ("network", "rm")),
    ):
        listed = run("docker", *kind, "--quiet", "--filter", label)
        if listed.code == 0 and (ids := listed.output.split()):
            run("docker", *remove, *ids)
    for path in Path("/var/tmp").glob(f"{PROJECT}-*"):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(KeyError):
        pwd.getpwnam(USER)
        if os.geteuid() == 0:
            run("userdel", "--remove", USER)


def keep_logs() -> None:
    """The logs and the state of every service of the throwaway stack."""
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    for container in compose.containers(PROJECT):
        told = run("docker", "logs", "--timestamps", container.name)
        (LOGS / f"{container.service}.log").write_text(f"{container}\n{told.output}")
