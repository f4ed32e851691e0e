"""What taskguard asks of the kernel: process tables, memory figures, and a few process attributes.

Reads /proc and /sys/fs/cgroup only. Sizes are bytes unless a name says MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)

_CGROUPS = Path("/sys/fs/cgroup")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def die_with_parent(parent: int, how: int = signal.SIGKILL) -> None:
    """Ends this process as soon as its parent ends. `parent`: who that is; it may be gone already."""
    _prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:
        os.kill(os.getpid(), how)


def adopt_orphans() -> None:
    """Orphans among this process's descendants become its children, not those of PID 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def dumpable() -> Iterator[None]:
    """Within it, /proc/self belongs to us. Airflow makes supervisors and tasks non-dumpable, so that
    tasks cannot read each other's memory; it stays that way outside of this moment."""
    before = _libc.prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
    _prctl(_PR_SET_DUMPABLE, 1)
    try:
        yield
    finally:
        if before == 0:
            _prctl(_PR_SET_DUMPABLE, 0)


def set_oom_score(score: int) -> None:
    """How soon the kernel picks this process, and those that it starts, when memory ends: -1000 never
    to 1000 first. Only upwards without privileges."""
    with dumpable():
        Path("/proc/self/oom_score_adj").write_text(str(score))


def open_own_details() -> int:
    """A descriptor of this process's memory by kind. Whoever holds it can read it later, which
    nobody else may of a non-dumpable process."""
    with dumpable():
        return os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)


def read_details(descriptor: int) -> dict[str, int] | None:
    """Sizes of an smaps_rollup by their kernel names; None when the process is gone."""
    try:
        text = os.pread(descriptor, 4096, 0).decode()
    except OSError:
        return None
    lines = (line.split() for line in text.splitlines()[1:])
    found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2}
    return found or None


def _read(path: str) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(descriptor, 8192).decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    group: int
    name: str
    zombie: bool
    ticks: int
    """CPU time so far, in the kernel's clock ticks."""


def process(pid: int) -> Process | None:
    """A process by its id; None when it is gone."""
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return None
    # The name stands in brackets and may hold brackets itself.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Process(
        pid,
        int(fields[1]),
        int(fields[2]),
        head.partition("(")[2],
        fields[0] in ("Z", "X"),
        int(fields[11]) + int(fields[12]),
    )


def processes() -> dict[int, Process]:
    """The process table of this container."""
    # Names, not Path objects: this is done many times a second.
    names = os.listdir("/proc")  # noqa: PTH208
    found = (process(int(name)) for name in names if name.isdigit())
    return {one.pid: one for one in found if one}


@dataclass(frozen=True)
class Memory:
    """A process's memory now."""

    anonymous: int
    """Heap and stack. In a forked process this includes pages that it still shares with its parent."""
    other: int
    """Files (which the kernel can drop) and shared memory (which it cannot)."""
    data: int
    """Virtual: what RLIMIT_DATA is compared with."""


def memory(pid: int) -> Memory | None:
    """A process's memory; readable for every process, whatever its protection."""
    text = _read(f"/proc/{pid}/statm")
    if not text:
        return None
    _, resident, shared, _, _, data, _ = (int(word) * PAGE for word in text.split())
    return Memory(resident - shared, shared, data)


def status(pid: int, key: str) -> int:
    """A size of /proc/PID/status, such as VmHWM or RssShmem; 0 when it is gone."""
    text = _read(f"/proc/{pid}/status") or ""
    for line in text.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def command(pid: int) -> str:
    """A process's command line, shortened."""
    text = _read(f"/proc/{pid}/cmdline") or ""
    return text.replace("\0", " ").strip()[:120]


@dataclass(frozen=True)
class Container:
    """The container's own memory, cgroup v1 or v2."""

    limit: int
    used: int
    """What cannot be given back: without the page cache of files, and without the kernel's caches of file names
    and the like where they are told apart (cgroup v2)."""
    oom_kills: int


def _figures(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {words[0]: int(words[1]) for words in pairs if len(words) == 2}
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 2**63


def _sum(cgroup: Path, *names: str) -> int:
    found = _figures(cgroup / "memory.stat")
    return sum(found.get(name, 0) for name in names)


def container(root: Path = _CGROUPS) -> Container:
    """Limit, use and kernel OOM kills of the cgroup that is mounted at `root`."""
    if (root / "memory.max").exists():
        return Container(
            _number(root / "memory.max"),
            _number(root / "memory.current") - _sum(root, "inactive_file", "active_file", "slab_reclaimable"),
            _figures(root / "memory.events").get("oom_kill", 0),
        )
    old = root / "memory"
    return Container(
        _number(old / "memory.limit_in_bytes"),
        _number(old / "memory.usage_in_bytes") - _sum(old, "total_inactive_file", "total_active_file"),
        _figures(old / "memory.oom_control").get("oom_kill", 0),
    )
