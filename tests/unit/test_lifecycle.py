"""What the verbs ask of the engine, and what they make of its answers: with a `docker` that only writes down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import status
from stack import compose, lifecycle, process
from stack.instance import ROOT, Instance
from tests.support import gone, wait_until


class Docker:
    """A `docker` on the PATH: it notes each call and what it finds in its environment; its answers are files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "docker"
        program.write_text(f"""#!/bin/sh
echo "$*" >> '{folder}/calls'
case "$*" in
  compose*) env > '{folder}/env'; . '{folder}/compose' ;;
  ps*) cat '{folder}/ids' ;;
  inspect*) cat '{folder}/containers' ;;
  volume*) cat '{folder}/volumes' ;;
esac
""")
        program.chmod(0o755)
        for name in ("calls", "compose", "ids", "containers", "volumes"):
            (folder / name).touch()

    def has(self, *containers: dict[str, Any]) -> None:
        """What `docker inspect` shows."""
        (self.folder / "ids").write_text("\n".join(str(one["Id"]) for one in containers))
        (self.folder / "containers").write_text(json.dumps(containers))

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        """Of the last Compose call."""
        return dict(line.split("=", 1) for line in (self.folder / "env").read_text().splitlines() if "=" in line)


def container(service: str, state: str = "running", *, code: int = 0, **labels: str) -> dict[str, Any]:
    """A container of the project `ours`, as `docker inspect` shows it; labels with their names' last parts."""
    own = {"project": "ours", "service": service, "config-hash": "h"}
    own |= {f"project.{name}": value for name, value in labels.items()}
    return {
        "Id": service,
        "Name": f"/ours-{service}-1",
        "State": {"Status": state, "ExitCode": code},
        "Config": {"Labels": {f"com.docker.compose.{name}": value for name, value in own.items()}, "Image": "x"},
        "RestartCount": 0,
    }


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Docker(tmp_path / "bin")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    """An instance with a plan and secrets; the programs take it for the current one."""
    made = Instance(tmp_path / "instance")
    made.secrets.mkdir(parents=True)
    made.env_file.write_text(
        "COMPOSE_PROJECT_NAME='ours'\nCOMPOSE_FILE='/clone/compose.yaml'\nCOMPOSE_PROFILES=''\nSTACK_NAME='ours'\n"
        "BIND_ADDRESS='127.0.0.1'\n"
    )
    monkeypatch.setenv("STACK_DIR", str(made.directory))
    return made


@pytest.mark.parametrize("verb", ["capture", "down", "logs"])
def test_the_shell_does_not_choose_the_stack(
    docker: Docker, prepared: Instance, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """What is exported for another project, or by another tool, does not reach Compose: .env's word counts."""
    exported = {"COMPOSE_PROJECT_NAME": "shop", "COMPOSE_PROFILES": "debug", "COMPOSE_IGNORE_ORPHANS": "1"}
    for name, value in (exported | {"BIND_ADDRESS": "0.0.0.0", "TERM": "vt100"}).items():
        monkeypatch.setenv(name, value)
    if verb == "capture":
        compose.Compose(prepared).capture("config")
    elif verb == "down":
        lifecycle.down(prepared)
    else:
        subprocess.run([sys.executable, ROOT / "scripts/compose.py", "logs"], check=True)
    seen = docker.environment
    assert (seen["COMPOSE_PROJECT_NAME"], seen["COMPOSE_PROFILES"], seen["COMPOSE_IGNORE_ORPHANS"]) == ("ours", "", "0")
    assert (seen["BIND_ADDRESS"], seen["TERM"]) == ("127.0.0.1", "vt100")
    assert all("--project-name ours" in call for call in docker.calls if call.startswith("compose"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize(("words", "told"), [([], "nothing is lost"), (["--volumes", "--yes"], "may be deleted")])
def test_an_interrupted_stop_stops_compose_too(
    docker: Docker, prepared: Instance, number: signal.Signals, words: list[str], told: str
) -> None:
    """By Ctrl-C, by a service manager, by a closed terminal: nothing goes on behind the operator's back."""
    pid_file = docker.folder / "pid"
    (docker.folder / "compose").write_text(f"echo $$ > '{pid_file}.new'; mv '{pid_file}.new' '{pid_file}'; sleep 30")
    child = subprocess.Popen(
        [sys.executable, ROOT / "scripts/down.py", *words],
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C is ignored in what a script started with `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(pid_file.exists, 20, "Compose's start")
    child.send_signal(number)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, gone(int(pid_file.read_text()))) == (130, True), said
    assert told in said.splitlines()[-1], said
    assert prepared.env_file.exists(), "the next attempt knows what to delete"


def test_compose_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """A time-out, not a traceback, is what the operator is told."""
    with (tmp_path / "output").open("w") as output:
        child = process.start(["sh", "-c", "trap '' TERM; echo ready; sleep 20"], output, {})
        wait_until((tmp_path / "output").read_text, 5, "the trap set")
        process.stop(child, patience=0.2)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("service", "state", "code", "good"),
    [("redis", "running", 0, True), ("redis", "exited", 0, False), ("minio-init", "exited", 0, True)]
    + [("minio-init", "exited", 1, False), ("redis", "paused", 0, False)],
)
def test_only_a_job_may_have_ended(
    docker: Docker, prepared: Instance, service: str, state: str, code: int, good: bool
) -> None:
    """`docker stop` ends a service with code 0: `make status` ends with 1 then, and `make up` starts it again."""
    docker.has(container(service, state, code=code))
    (docker.folder / "compose").write_text(f"echo {service} h")
    assert lifecycle.is_current(compose.Compose(prepared)) is good
    assert status.main([]) == (0 if good else 1)
