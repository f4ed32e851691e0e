"""The well-known checkers find nothing. Each guards against an empty list of files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stack.instance import ROOT

TOOLS = Path(sys.executable).parent


def tracked(*patterns: str) -> list[str]:
    """Files that git tracks or would track, by pattern, relative to the clone."""
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def programs(interpreter: str) -> list[str]:
    """Every file whose first line names an interpreter, whatever its own name ends with."""
    found = []
    for name in tracked():
        with (ROOT / name).open("rb") as file:
            if re.match(rf"#!.*[/ ]{interpreter}\s".encode(), file.readline()):
                found.append(name)
    return found


def check(*words: str) -> None:
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(command: list[str]) -> None:
    """Python is free of the usual mistakes, and formatted; programs without a `.py` as well."""
    scripts = programs("python3")
    assert len(scripts) >= 3
    assert len(tracked("scripts/*.py", "dags/*.py", "dockerfiles/*.py", "tests/*.py")) >= 40
    check(str(TOOLS / "ruff"), *command, "scripts", "tests", "dags", "dockerfiles", "bench", "examples", *scripts)


def test_mypy() -> None:
    """The host programs and taskguard are typed, strictly."""
    check(str(TOOLS / "mypy"))


def test_yamllint() -> None:
    files = tracked("*.yaml", "*.yml")
    assert len(files) >= 8
    check(str(TOOLS / "yamllint"), "--strict", *files)


def test_hadolint() -> None:
    files = tracked("dockerfiles/*/Dockerfile")
    assert len(files) >= 6
    check(str(TOOLS / "hadolint"), *files)


def test_shellcheck() -> None:
    files = programs("(?:ba|da)?sh")
    assert len(files) >= 9
    check(str(TOOLS / "shellcheck"), *files)


def test_dags_compile() -> None:
    """The shipped DAG files are Python of the images' version or older: they parse."""
    files = tracked("dags/*.py")
    assert files
    for name in files:
        compile((ROOT / name).read_text(encoding="utf-8"), name, "exec", dont_inherit=True)
