"""The container engine: is it there, new enough, reachable; and where we may, install and start it.

`inspect` only looks. `install` and `start` change the host, say so first, and are only called as
root on a distribution whose packages are known to be new enough. An engine that is there stays as it is:
nothing installed is upgraded or removed, because other projects' containers may run on it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stack.console import Step, say
from stack.errors import Exit, StackError
from stack.host import MIB, Host
from stack.process import OUT_OF_TIME, Result, capture, stream

MIN_ENGINE = (25, 0)
"""health checks' `start_interval` came with Engine 25."""
MIN_COMPOSE = (2, 26)
"""The oldest Compose that this project was tried with."""

# Distribution -> packages. Debian 12's own engine is 20.10: there the engine comes from Debian 13,
# while runc and iptables stay Debian 12's, because Debian 13's would upgrade the C library.
_FROM_TRIXIE = ("docker.io", "docker-cli", "docker-compose", "docker-buildx", "containerd")
PACKAGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("debian", "12"): (*(f"{name}/trixie" for name in _FROM_TRIXIE), "runc", "iptables"),
    ("debian", "13"): (*_FROM_TRIXIE, "runc", "iptables"),
    ("ubuntu", "22.04"): ("docker.io", "docker-compose-v2", "docker-buildx", "iptables"),
    ("ubuntu", "24.04"): ("docker.io", "docker-compose-v2", "docker-buildx", "iptables"),
}

_QUIET = ("env", "DEBIAN_FRONTEND=noninteractive")
_APT = (*_QUIET, "apt-get", "-qy", "-o", "DPkg::Lock::Timeout=300")
_APT_FOLDER = Path("/etc/apt")
_ANSWER_S = 15
_LOG = Path("/var/log/stack-dockerd.log")
_START_PATIENCE_S = 90


@dataclass(frozen=True)
class Engine:
    """What `docker` says of itself."""

    server: str
    compose: str
    memory: int
    """MiB that the engine's machine has: on Docker Desktop, its virtual machine's."""
    cpus: int
    root_dir: str
    memory_limits: bool


def version(text: str) -> tuple[int, ...]:
    """(26, 1) of `26.1.5+dfsg1` or `v2.26.1-4`; () where there is no number."""
    numbers = []
    for part in text.strip().lstrip("v").split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _ask(*words: str) -> Result:
    return capture(["docker", *words], timeout=_ANSWER_S, check=False)


def _ask_plugin(name: str, *words: str) -> Result:
    """A plugin's answer. Raises StackError (E-ENGINE, exit 4) where none comes: a slow one is not a missing one."""
    answer = _ask(name, "version", *words)
    if answer.code == OUT_OF_TIME:
        raise StackError(
            "E-ENGINE",
            f"`docker {name} version` did not answer",
            why=answer.err,
            fix="run the same command again when this host is less busy",
            exit_code=Exit.TIMED_OUT,
        )
    return answer


def _ask_engine() -> int:
    return _ask("version", "--format", "{{.Server.Version}}").code


def reachable() -> bool:
    """Whether an engine answers."""
    return _ask_engine() == 0


def missing() -> list[str]:
    """What is not installed: of `engine` (an engine elsewhere counts), `cli`, `compose` and `buildx`.

    Raises StackError (E-ENGINE, exit 4) where a plugin is there and does not answer in time.
    """
    lacking = ["engine"] if _dockerd() is None and _ask_engine() not in (0, OUT_OF_TIME) else []
    if shutil.which("docker") is None:
        return [*lacking, "cli", "compose", "buildx"]
    return lacking + [name for name in ("compose", "buildx") if _ask_plugin(name).code != 0]


def _dockerd() -> str | None:
    return shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def inspect() -> Engine:
    """The engine's facts. Raises StackError where it is missing, unreachable or too old."""
    answer = capture(["docker", "info", "--format", "{{json .}}"], timeout=30, check=False)
    info = json.loads(answer.out) if answer.out.strip().startswith("{") else {}
    if answer.code != 0 or not info.get("ServerVersion"):
        reason = (answer.err.strip() or "\n".join(info.get("ServerErrors") or []) or "no answer").splitlines()[-1]
        if "permission denied" in reason.lower():
            raise StackError(
                "E-ENGINE-ACCESS",
                "this user may not use the Docker Engine",
                why=reason,
                fix="sudo usermod -aG docker $USER, then log in again (being in that group is like being root)",
            )
        raise StackError(
            "E-ENGINE",
            "no Docker Engine answers",
            why=reason,
            fix="start it (sudo systemctl start docker, or Docker Desktop); as root on Debian or Ubuntu `make up` does",
        )
    compose = _ask_plugin("compose", "--short").out.strip()
    found = Engine(
        server=info["ServerVersion"],
        compose=compose,
        memory=int(info.get("MemTotal", 0)) // MIB,
        cpus=int(info.get("NCPU", 1)),
        root_dir=info.get("DockerRootDir", "/var/lib/docker"),
        memory_limits=bool(info.get("MemoryLimit", True)),
    )
    require(found)
    return found


def require(engine: Engine) -> None:
    """Raises StackError (E-ENGINE-OLD, E-ENGINE-MEMORY) where an engine cannot run the stack."""
    upgrade = "upgrade the Docker packages; on Debian 12 they come from Debian 13 (docs/operate.md)"
    if version(engine.server) < MIN_ENGINE:
        raise StackError(
            "E-ENGINE-OLD",
            f"Docker Engine {engine.server} is too old; the stack needs {MIN_ENGINE[0]} or newer",
            why="health checks with a start interval came with Engine 25; without them starting takes minutes",
            fix=upgrade,
        )
    if version(engine.compose) < MIN_COMPOSE:
        raise StackError(
            "E-ENGINE-OLD",
            f"Docker Compose {engine.compose or '(none)'} is too old; the stack needs "
            f"{'.'.join(map(str, MIN_COMPOSE))} or newer",
            why="older ones read these Compose files differently, or not at all",
            fix=upgrade,
        )
    if not engine.memory_limits:
        raise StackError(
            "E-ENGINE-MEMORY",
            "this engine cannot limit memory",
            why="the kernel's memory cgroup is off; without limits one task could take the whole host",
            fix="boot with cgroup_enable=memory swapaccount=1, then run the same command again",
        )


def ensure(host: Host, *, may_install: bool) -> Engine:
    """The engine, installed and started where that is needed and allowed."""
    # An engine that the operator points at is somebody else's to install and start.
    if "DOCKER_HOST" not in os.environ:
        if lacking := missing():
            install(host, _title(lacking), _packages(host, lacking, may_install))
        if may_install and not reachable() and host.root and _dockerd():
            start(host)
    return inspect()


def _title(lacking: list[str]) -> str:
    if "engine" in lacking:
        return "Docker Engine"
    return " and ".join(f"Docker {name.capitalize()}" for name in lacking)


def _packages(host: Host, lacking: list[str], may_install: bool) -> list[str]:
    """The packages that bring what is missing. Raises StackError (E-ENGINE) where we may not install them."""
    known = PACKAGES.get((host.os_id, host.os_version), ())
    engine_too = "engine" in lacking
    packages = [name for name in known if engine_too or name.startswith(tuple(f"docker-{part}" for part in lacking))]
    # Beside somebody else's engine the distribution's packages conflict with what that one brought.
    ours = engine_too or _distributions_own()
    if packages and ours and host.root and may_install:
        return packages
    why = "INSTALL_ENGINE=never is set" if known and host.root else "installing it needs root on a known distribution"
    if not ours:
        plugins = " ".join(f"docker-{name}-plugin" for name in lacking if name != "cli")
        why = "the engine on this host is not the distribution's docker.io: `make up` leaves its packages alone"
        fix = f"install {plugins} where the engine is docker.com's, or else what its own documentation names"
    elif known:
        fix = f"as root: make up. It installs the distribution's packages: {' '.join(packages)}"
    else:
        fix = "install Docker Engine 25 or newer with Compose 2.26 and Buildx, as your system's documentation says"
    raise StackError("E-ENGINE", f"not installed: {_title(lacking)}", why=why, fix=fix)


def _distributions_own() -> bool:
    """Whether this host's engine is the package docker.io."""
    program = os.path.realpath(_dockerd() or "dockerd")
    return capture(["dpkg-query", "--search", program], timeout=15, check=False).out.startswith("docker.io:")


def install(host: Host, title: str, packages: list[str]) -> None:
    """Installs these of the distribution's packages. Changes the host, and says what; what is installed stays."""
    say(f"not installed: {title}. Installing {' '.join(packages)} with apt-get")
    with Step(f"installing {title}") as progress:
        _apt(progress.update, "update")
        if (host.os_id, host.os_version) == ("debian", "12"):
            _add_trixie()
            _apt(progress.update, "update")
        _apt(progress.update, "install", "--no-install-recommends", "--no-remove", "--no-upgrade", *packages)


def apt_install(*packages: str) -> None:
    """Installs packages of the distribution (the bootstrap's tools). Root on Debian or Ubuntu only."""
    with Step(f"installing {' '.join(packages)}") as progress:
        if capture([*_APT, "install", "--no-install-recommends", *packages], timeout=600, check=False).code != 0:
            _apt(progress.update, "update")
            _apt(progress.update, "install", "--no-install-recommends", *packages)


def _apt(on_line: Callable[[str], None], *words: str) -> None:
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        on_line(line[:80])

    if words[0] == "install":
        # apt-get refuses where an earlier installation was broken off. On a sound host this does nothing; where it
        # fails, another program may have the lock: apt-get waits for that, and what counts is how it ends.
        stream([*_QUIET, "dpkg", "--configure", "-a"], timeout=900, on_line=lambda line: on_line(line[:80]))
    code = stream([*_APT, *words], timeout=900, on_line=keep)
    # A source of somebody else's that does not answer fails `update`; what counts is `install`.
    if code != 0 and words[0] != "update":
        raise StackError(
            "E-ENGINE-INSTALL",
            f"apt-get {words[0]} failed with code {code}",
            why="\n".join(lines[-12:]),
            fix="see that this host reaches its mirror; where it says that packages need to be removed, decide that.\n"
            "Then run the same command again",
            changed="packages may be partly installed",
            exit_code=Exit.FAILED,
        )


def _debian_mirror() -> str:
    """The mirror that this host's own sources name."""
    lines = capture(["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"], timeout=30).out
    for line in lines.splitlines():
        origin, _, rest = line.partition(" ")
        codename, _, uri = rest.partition(" ")
        if origin == "Debian" and "security" not in codename and uri:
            return uri.rstrip("/")
    raise StackError(
        "E-ENGINE-INSTALL",
        "no Debian mirror is among this host's package sources",
        why="Debian 12's own engine is too old; the one of Debian 13 comes from the same mirror",
        fix="add a Debian mirror to /etc/apt/sources.list, or install Docker Engine 25 yourself",
    )


def _add_trixie() -> None:
    """Makes Debian 13's packages available, at a priority that upgrades nothing by itself."""
    say("Debian 12's engine is too old: adding Debian 13 as a source of low priority (/etc/apt/*/stack-trixie*)")
    mirror = _debian_mirror()
    # The pin first: an interruption in between must not leave a source that upgrades the whole host.
    pin = _APT_FOLDER / "preferences.d/stack-trixie"
    pin.write_text("Package: *\nPin: release n=trixie*\nPin-Priority: 100\n")
    (_APT_FOLDER / "sources.list.d/stack-trixie.sources").write_text(
        f"Types: deb\nURIs: {mirror}\nSuites: trixie\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def start(host: Host) -> None:
    """Starts the installed engine and waits until it answers. Raises StackError after 90 s."""
    with Step("starting Docker Engine") as progress:
        if host.systemd:
            capture(["systemctl", "enable", "--now", "docker"], timeout=120)
        else:
            _clear_stale("/run/docker.pid", "dockerd")
            _clear_stale("/run/docker/containerd/containerd.pid", "containerd")
            # A session of its own: the engine outlives this program and its terminal.
            with _LOG.open("ab") as log:
                subprocess.Popen(
                    [_dockerd() or "dockerd"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd="/",
                )
        deadline = time.monotonic() + _START_PATIENCE_S
        while not reachable():
            if time.monotonic() > deadline:
                tail = "" if host.systemd or not _LOG.exists() else "\n".join(_LOG.read_text().splitlines()[-8:])
                raise StackError(
                    "E-ENGINE",
                    f"Docker Engine did not answer within {_START_PATIENCE_S} s of its start",
                    why=tail or "see `journalctl -u docker`",
                    fix="mend what its log says, then run the same command again",
                    changed="the engine was started",
                    exit_code=Exit.TIMED_OUT,
                )
            progress.update("waiting for `docker version`")
            time.sleep(0.3)


def _clear_stale(pid_file: str, program: str) -> None:
    """Removes the pid file of an engine that was killed; dockerd refuses to start beside one."""
    path = Path(pid_file)
    try:
        name = Path(f"/proc/{int(path.read_text())}/comm").read_text().strip()
    except (OSError, ValueError):
        name = ""
    if path.exists() and name != program:
        path.unlink()
