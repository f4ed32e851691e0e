"""make lock: resolves every requirements.in again and writes the lock files, with hashes.

Changes: the *.lock files beside them. Review the diff and commit it. Exit: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stack.console import Step
from stack.errors import run_main
from stack.instance import ROOT, VAR
from stack.process import capture


@dataclass(frozen=True)
class Lock:
    """A requirements file, its lock, and the Python that it is for."""

    source: Path
    lock: Path
    python: str


# The images have Debian 13's Python; the host programs run on whatever the host has, from 3.10 on.
LOCKS = (
    Lock(ROOT / "dockerfiles/base/uv.in", ROOT / "dockerfiles/base/uv.lock", "3.13"),
    *(
        Lock(ROOT / f"dockerfiles/{image}/requirements.in", ROOT / f"dockerfiles/{image}/requirements.lock", "3.13")
        for image in ("airflow", "mlflow", "minio", "serving")
    ),
    Lock(ROOT / "scripts/requirements.in", ROOT / "scripts/requirements.lock", "3.10"),
    Lock(ROOT / "examples/requirements.in", ROOT / "examples/requirements.lock", "3.10"),
    Lock(ROOT / "tests/requirements.in", ROOT / "tests/requirements.lock", "3.10"),
)


def main(argv: Sequence[str]) -> int:
    """Writes the locks."""
    parser = argparse.ArgumentParser(prog="make lock", description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the files allow")
    arguments = parser.parse_args(argv)
    uv = install_uv()
    for lock in LOCKS:
        with Step(f"resolving {lock.source.relative_to(ROOT)}"):
            capture(
                [
                    *(uv, "pip", "compile", "--quiet", "--generate-hashes", "--universal", "--no-header"),
                    *("--no-emit-index-url", "--no-emit-find-links", "--python-version", lock.python),
                    *(["--upgrade"] if arguments.upgrade else []),
                    *("--output-file", lock.lock.relative_to(ROOT), lock.source.relative_to(ROOT)),
                ],
                timeout=600,
                # Relative paths: the lock's comments must not name this clone's directory.
                cwd=ROOT,
            )
    return 0


def install_uv() -> Path:
    """The resolver of the version that the images use, in an environment of its own."""
    folder = VAR / "uv"
    if not (folder / "bin/uv").exists():
        with Step("installing the resolver"):
            capture(["python3", "-m", "venv", folder], timeout=120)
            lock = ROOT / "dockerfiles/base/uv.lock"
            capture([folder / "bin/python", "-m", "pip", "install", "-q", "--require-hashes", "-r", lock], timeout=300)
    return folder / "bin/uv"


if __name__ == "__main__":
    run_main(main)
