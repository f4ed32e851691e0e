"""What this host has: memory, CPUs, disk, system. Reads only; knows nothing of the engine."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20

# A cgroup v1 without a limit says a huge number instead of "max".
_NO_LIMIT = 2**60


@dataclass(frozen=True)
class Host:
    """The facts that the plan and the preflight use."""

    memory: int
    """MiB that we may use: the machine's, or our own cgroup's limit where that is lower."""
    cpus: float
    architecture: str
    os_id: str
    os_version: str
    root: bool
    systemd: bool


def memory_mib(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """MiB of memory: MemTotal, or the lowest limit of the cgroups that we are in (v1 and v2)."""
    limits = []
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    limits += [limit for limit in _cgroup_memory_limits(proc, cgroup) if limit < _NO_LIMIT]
    return min(limits) // MIB


def _cgroup_memory_limits(proc: Path, cgroup: Path) -> list[int]:
    limits = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = cgroup, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = cgroup / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A parent's limit binds as well. In a container the path may be the host's: then only "/" exists.
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            try:
                text = (base.joinpath(*parts[:depth]) / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits


def cpu_count() -> float:
    """CPUs that this process may use."""
    return float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)


def free_disk_mib(path: Path) -> int:
    """MiB free on the file system of `path`, or of its nearest parent that exists and that we may look at."""
    while not os.access(path, os.F_OK):
        path = path.parent
    return shutil.disk_usage(path).free // MIB


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def read() -> Host:
    """The host that we run on."""
    release = _os_release()
    linux = platform.system() == "Linux"
    return Host(
        # Elsewhere (Docker Desktop) the engine's own figure is what counts; see preflight.
        memory=memory_mib() if linux else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        cpus=cpu_count(),
        architecture=platform.machine(),
        os_id=release.get("ID", platform.system().lower()),
        os_version=release.get("VERSION_ID", ""),
        root=hasattr(os, "geteuid") and os.geteuid() == 0,
        systemd=Path("/run/systemd/system").is_dir(),
    )
