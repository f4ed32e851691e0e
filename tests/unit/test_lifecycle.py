"""What the verbs ask of the engine, and what they make of its answers: with a `docker` that only writes down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stack import compose, lifecycle
from stack.instance import ROOT, Instance


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
esac
""")
        program.chmod(0o755)
        for name in ("calls", "compose", "ids", "containers"):
            (folder / name).touch()

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        """Of the last Compose call."""
        return dict(line.split("=", 1) for line in (self.folder / "env").read_text().splitlines() if "=" in line)


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
