"""Checks that change nothing. Each returns the errors it found; all are told at once.

`before_engine` needs nothing but the host; `with_engine` asks the running engine as well.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stack import compose, dags, images, secrets
from stack.engine import Engine
from stack.errors import StackError
from stack.host import Host, free_disk_mib
from stack.instance import ROOT, Instance
from stack.plan import Plan, load_sizing, make_plan
from stack.process import capture
from stack.settings import Settings

ARCHITECTURES = ("x86_64", "amd64", "aarch64", "arm64")
DISK_TO_BUILD_MIB = 12 * 1024
"""Images 2.2 GiB, build cache and package caches 6 GiB (measured after a cold build), and room."""
DISK_TO_BUILD_ONE_MIB = 3 * 1024
"""For a single image, beside others that are there; four or more need as much as all of them."""
DISK_TO_RUN_MIB = 3 * 1024
"""Room for databases, logs and artifacts to begin with."""
AIRFLOW_USER = 50000
"""User and group in Airflow's image: what belongs to it need not be open for others."""
_WALK = 20_000
"""Entries of a mounted folder that are looked at: one with data in it must not hold up every command."""


def plan_for(host: Host, settings: Settings, engine: Engine | None = None) -> Plan:
    """The plan for this host, or for the engine's machine where that is smaller (Docker Desktop)."""
    cpus = settings.stack_cpus or (min(host.cpus, engine.cpus) if engine else host.cpus)
    available = min(host.memory, engine.memory) if engine and engine.memory else host.memory
    worker, task = (size and size // 2**20 for size in (settings.worker_memory, settings.task_memory))
    opted = settings.opted
    if settings.stack_memory is None:
        return make_plan(load_sizing(), available, cpus, worker=worker, task=task, opted=opted)
    wanted = settings.stack_memory // 2**20
    if wanted > available:
        raise StackError(
            "E-MEM-LOW",
            f"STACK_MEMORY is {wanted:,} MiB; this host has {available:,} MiB",
            why="the sum of all limits would exceed the host's memory, and the kernel would choose what dies",
            fix="lower STACK_MEMORY in stack.env, or leave it empty",
        )
    return make_plan(load_sizing(), wanted, cpus, whole=True, worker=worker, task=task, opted=opted)


def before_engine(host: Host, settings: Settings, instance: Instance) -> list[StackError]:
    """What can be known without an engine."""
    return _collect(
        [
            lambda: check_architecture(host),
            lambda: plan_for(host, settings),
            lambda: check_disk(instance.directory, 64, "the stack's own files"),
            lambda: check_clock(),
            lambda: check_folder(settings.dags_dir, "DAGS_DIR"),
            lambda: check_folder(settings.plugins_dir, "PLUGINS_DIR"),
            lambda: check_readable(ROOT / "config", *_airflow_folders(settings)),
            lambda: images.user_requirements(settings),
            lambda: dags.check_folder(settings),
            lambda: dags.connection(settings, secrets.given(instance.secrets)) if settings.dags_git_url else None,
            lambda: images.ca_bundle(settings),
            lambda: check_writable(instance.directory),
            lambda: compose.render_environment({"STACK_DIR": str(instance.directory), "the clone": str(ROOT)}),
            lambda: check_colon(instance.directory, "STACK_DIR"),
            lambda: check_colon(ROOT, "the clone"),
        ]
    )


def with_engine(host: Host, settings: Settings, engine: Engine, *, to_build: int) -> list[StackError]:
    """What needs the engine's answer: its memory, its disk for so many images to build, the ports."""
    own = _own_ports(settings.stack_name)
    checks: list[Callable[[], object]] = [
        lambda: plan_for(host, settings, engine),
        lambda: check_engine_disk(engine, to_build=to_build),
    ]
    for key, port in settings.ports.items():
        if port not in own:
            checks.append(lambda key=key, port=port: check_port(key, settings.bind_address, port))  # type: ignore[misc]
    return _collect(checks)


def _collect(checks: Iterable[Callable[[], object]]) -> list[StackError]:
    errors = []
    for check in checks:
        try:
            check()
        except StackError as error:
            errors.append(error)
    return errors


def raise_all(errors: list[StackError]) -> None:
    """Raises the errors as one: the first one's code, every one's text."""
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    raise _SeveralError(errors)


class _SeveralError(StackError):
    """More than one unmet precondition."""

    def __init__(self, errors: list[StackError]) -> None:
        first = errors[0]
        super().__init__(first.code, first.what, why=first.why, fix=first.fix, exit_code=first.exit_code)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def check_colon(path: Path, name: str) -> None:
    """Raises E-PATH where a path has a colon."""
    if ":" in str(path):
        raise StackError(
            "E-PATH",
            f"{name} contains a colon: '{path}'",
            why="it parts one path from the next where Compose is told of its files and of what to mount",
            fix="use a directory without one",
        )


def check_architecture(host: Host) -> None:
    """amd64 and arm64 only."""
    if host.architecture not in ARCHITECTURES:
        raise StackError(
            "E-ARCH",
            f"this host is {host.architecture}; the stack runs on amd64 and arm64",
            why="some locked Python packages have no build for other processors",
            fix="use another host",
        )


def check_disk(path: Path, need_mib: int, what_for: str) -> None:
    """Raises E-DISK when the file system of `path` has less than `need_mib` MiB free."""
    free = free_disk_mib(path)
    if free < need_mib:
        raise StackError(
            "E-DISK",
            f"{free} MiB are free at {path}; {what_for} need {need_mib} MiB",
            why="a database that meets a full disk stops in the middle of its work",
            fix="free some space (`docker system df` shows the engine's part), or move the clone or the engine's data",
        )


def check_engine_disk(engine: Engine, *, to_build: int) -> None:
    """Raises E-DISK when the engine's own file system lacks room to run, or for so many images to build.

    A remote or a hidden one is not seen.
    """
    if os.access(engine.root_dir, os.F_OK):
        need = max(DISK_TO_RUN_MIB, min(DISK_TO_BUILD_MIB, to_build * DISK_TO_BUILD_ONE_MIB))
        check_disk(Path(engine.root_dir), need, "images and data")


def check_clock() -> None:
    """A clock before this file's own date would fail TLS and make heartbeats look old."""
    written = Path(__file__).stat().st_mtime
    if time.time() < written - 86400:
        raise StackError(
            "E-CLOCK",
            f"this host's clock says {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, before this clone was made",
            why="certificates and heartbeats are judged by the clock",
            fix="set the clock (timedatectl set-ntp true)",
        )


def check_folder(folder: str, key: str) -> None:
    """Raises E-DAGS-DIR when a folder of the operator's is missing, E-PATH where it cannot be mounted."""
    path = (ROOT / folder).resolve()
    check_colon(path, key)
    if not path.is_dir():
        raise StackError(
            "E-DAGS-DIR",
            f"{key}={folder}: {path} is not a directory",
            why="it is mounted into Airflow; the engine would create an empty one that belongs to root",
            fix=f"mkdir -p '{path}', or correct {key} in stack.env",
        )


def _airflow_folders(settings: Settings) -> list[Path]:
    return [(ROOT / folder).resolve() for folder in (settings.dags_dir, settings.plugins_dir)]


def check_readable(*folders: Path) -> None:
    """Raises E-READ where something in mounted folders is closed to the users of the containers.

    Hidden files and caches are left out: a repository's own, an editor's or a person's may well be closed.
    """
    closed = {folder: first for folder in folders if (first := next(_closed(folder), None))}
    if closed:
        raise StackError(
            "E-READ",
            f"containers cannot read {', '.join(map(str, closed.values()))}",
            why="the services have users of their own, to whom a clone made with umask 027 or 077 is closed",
            fix=f"chmod -R go+rX {' '.join(shlex.quote(str(folder)) for folder in closed)}",
        )


def _closed(folder: Path) -> Iterator[Path]:
    """What a container's user cannot read or enter, of a folder and what is in it."""
    for path in itertools.islice(_mounted(folder), _WALK):
        with contextlib.suppress(OSError):
            found = path.lstat()
            own = 6 if found.st_uid == AIRFLOW_USER else 3 if found.st_gid == AIRFLOW_USER else 0
            wanted = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
            if found.st_mode >> own & wanted != wanted:
                yield path


def _mounted(folder: Path) -> Iterator[Path]:
    yield folder
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        yield from (Path(where, name) for name in (*folders, *files) if not name.startswith("."))


def check_writable(directory: Path) -> None:
    """Raises E-WRITE when the instance's directory cannot be written by this user."""
    nearest = directory
    while not os.access(nearest, os.F_OK):
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StackError(
            "E-WRITE",
            f"this user cannot write to {nearest}",
            why="the plan (.env) and the secrets are written there",
            fix=f"sudo chown -R $(id -u) '{nearest}'",
        )


def check_port(key: str, address: str, port: int) -> None:
    """Raises E-PORT when something listens there, or when this user may not."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            return  # A low port: the engine, which runs as root, may take it.
        except OSError as error:
            raise StackError(
                "E-PORT",
                f"{key}={port} is in use on {address}",
                why=f"another program listens there ({error.strerror}); `ss -ltnp 'sport = :{port}'` names it",
                fix=f"stop that program, or set {key} in stack.env to a free port",
            ) from error


def _own_ports(project: str) -> set[int]:
    """Ports that this stack's own containers hold already."""
    listing = capture(
        ["docker", "ps", "--filter", f"label=com.docker.compose.project={project}", "--format", "{{.Ports}}"],
        timeout=30,
        check=False,
    ).out
    return {
        int(part.split("->")[0].rsplit(":", 1)[1])
        for part in listing.replace("\n", ", ").split(", ")
        if "->" in part and ":" in part
    }
