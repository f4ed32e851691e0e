"""What `docker` says is understood: a real client process, canned answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stack import engine
from stack.errors import Exit, StackError
from stack.host import Host
from tests.support import script

INFO: dict[str, Any] = {
    "ServerVersion": "26.1.5+dfsg1",
    "MemTotal": 8 * 2**30,
    "NCPU": 4,
    "DockerRootDir": "/srv/docker",
    "MemoryLimit": True,
    "OperatingSystem": "Debian GNU/Linux 13 (trixie)",
}


class Docker:
    """A `docker` on the PATH whose answers are files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script(
            folder / "docker",
            f"""case "$1" in
  info) cat '{folder}/err' >&2; cat '{folder}/info'; exit "$(cat '{folder}/code')" ;;
  compose) cat '{folder}/compose' ;;
  buildx) echo 'github.com/docker/buildx 0.13.1 abc' ;;
  *) exit 99 ;;
esac""",
        )
        self.says(INFO)

    def says(self, info: dict[str, Any] | str, *, err: str = "", code: int = 0, compose: str = "2.26.1-4\n") -> None:
        text = info if isinstance(info, str) else json.dumps(info)
        for name, content in (("info", text), ("err", err), ("code", str(code)), ("compose", compose)):
            (self.folder / name).write_text(content)


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Docker(tmp_path)


def refused() -> StackError:
    with pytest.raises(StackError) as error:
        engine.inspect()
    assert error.value.exit_code == Exit.PRECONDITION
    return error.value


@pytest.mark.usefixtures("docker")
def test_a_good_engine_is_read() -> None:
    assert engine.inspect() == engine.Engine(
        server="26.1.5+dfsg1",
        compose="2.26.1-4",
        memory=8192,
        cpus=4,
        root_dir="/srv/docker",
        memory_limits=True,
    )


def test_an_old_engine_is_refused_with_both_versions(docker: Docker) -> None:
    docker.says(INFO | {"ServerVersion": "20.10.24+dfsg1"})
    error = refused()
    assert error.code == "E-ENGINE-OLD"
    assert "20.10.24" in error.what
    assert "25" in error.what


@pytest.mark.parametrize(("compose", "told"), [("2.25.9\n", "2.25.9"), ("", "(none)"), ("1.29.2\n", "1.29.2")])
def test_an_old_or_missing_compose_is_refused(docker: Docker, compose: str, told: str) -> None:
    docker.says(INFO, compose=compose)
    error = refused()
    assert error.code == "E-ENGINE-OLD"
    assert f"Docker Compose {told} is too old" in error.what


def test_an_engine_that_cannot_limit_memory_is_refused(docker: Docker) -> None:
    docker.says(INFO | {"MemoryLimit": False})
    assert refused().code == "E-ENGINE-MEMORY"


@pytest.mark.parametrize("code", [0, 1])
def test_permission_denied_is_told_apart_from_no_answer(docker: Docker, code: int) -> None:
    """Newer clients exit 1, older ones print ServerErrors and exit 0."""
    reason = "permission denied while trying to connect to the Docker daemon socket"
    docker.says({"ServerErrors": [reason]}, err=f"{reason}\n" if code else "", code=code)
    error = refused()
    assert error.code == "E-ENGINE-ACCESS"
    assert reason in error.why
    docker.says({"ServerErrors": ["Cannot connect to the Docker daemon"]}, code=code)
    error = refused()
    assert error.code == "E-ENGINE"
    assert "Cannot connect" in error.why


def test_an_answer_that_is_no_json_is_no_engine(docker: Docker) -> None:
    docker.says("", err="flag provided but not defined: -format\n", code=125)
    assert refused().code == "E-ENGINE"


def test_no_client_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused()
    assert error.code == "E-ENGINE"
    assert "docker: not found" in error.why


class Bare:
    """A PATH of stand-ins: what is put there is installed, and apt-get keeps what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has("apt-get", f'echo "$*" >> {folder}/told')
        self.has("env", 'shift; exec "$@"')

    def has(self, program: str, body: str) -> None:
        script(self.folder / program, body)

    def engine(self, package: str, *lacking: str) -> None:
        """A dockerd of a package, a client without some plugins, and an engine that answers."""
        self.has("dockerd", "exit 1")
        self.has("dpkg-query", f'echo "{package}: $2"')
        self.has("docker", f'case "$1" in {"|".join(lacking)}) exit 1;; info) exit 1;; esac')

    @property
    def installed(self) -> list[str]:
        told = self.folder / "told"
        lines = told.read_text().splitlines() if told.exists() else []
        return [line.partition(" install ")[2] for line in lines if " install " in line]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bare:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    # This machine's own is in /usr/sbin, where it is looked for, too.
    monkeypatch.setattr(engine, "_dockerd", lambda: next(map(str, tmp_path.glob("dockerd")), None))
    return Bare(tmp_path)


ROOT_ON_13 = Host(8192, 2, "x86_64", "debian", "13", root=True, systemd=True)
OPTIONS = "--no-install-recommends --no-remove --no-upgrade"


def ensure() -> StackError:
    """These stand-ins never come to an engine that can be read: `inspect` refuses in the end, if nobody did before."""
    with pytest.raises(StackError) as error:
        engine.ensure(ROOT_ON_13, may_install=True)
    return error.value


def test_a_bare_host_gets_everything(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    ensure()
    assert bare.installed == [f"{OPTIONS} {' '.join(engine.PACKAGES['debian', '13'])}"]
    assert "not installed: Docker Engine." in capsys.readouterr().err


def test_an_interrupted_installation_is_ended_first(bare: Bare) -> None:
    """dpkg refuses every other installation until then. Where it cannot have its lock, apt-get waits for that."""
    bare.has("dpkg", f'echo " dpkg $*" >> {bare.folder}/told; exit 2')
    ensure()
    told = (bare.folder / "told").read_text().splitlines()
    (installs,) = [number for number, line in enumerate(told) if " install " in line]
    assert told[installs - 1] == " dpkg --configure -a"


def test_debian_13s_packages_never_come_without_their_low_priority(
    bare: Bare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between the two files (here there is no folder for the second one), no upgrade of the host is left;
    without a mirror neither is written."""
    monkeypatch.setattr(engine, "_APT_FOLDER", tmp_path / "apt")
    pin, sources = tmp_path / "apt/preferences.d/stack-trixie", tmp_path / "apt/sources.list.d"
    pin.parent.mkdir(parents=True)
    with pytest.raises(StackError, match="no Debian mirror"):
        engine._add_trixie()
    assert not pin.exists()
    bare.has("apt-get", "echo Debian bookworm http://deb.example/debian/")
    with pytest.raises(FileNotFoundError):
        engine._add_trixie()
    assert "Pin-Priority: 100" in pin.read_text()
    sources.mkdir()
    engine._add_trixie()
    assert "URIs: http://deb.example/debian\n" in (sources / "stack-trixie.sources").read_text()


def test_beside_the_distributions_engine_only_the_plugin_is_installed(
    bare: Bare, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else apt would upgrade a running engine, and stop what runs on it."""
    bare.engine("docker.io", "compose")
    ensure()
    assert bare.installed == [f"{OPTIONS} docker-compose"]
    assert "not installed: Docker Compose." in capsys.readouterr().err


@pytest.mark.parametrize("package", ["docker-ce", "somebody"])
def test_beside_another_engine_nothing_is_installed(bare: Bare, package: str) -> None:
    """docker.io would take the place of docker-ce, whose containers would stop."""
    bare.engine(package, "compose", "buildx")
    error = ensure()
    assert (error.code, error.exit_code, bare.installed) == ("E-ENGINE", Exit.PRECONDITION, [])
    assert error.what == "not installed: Docker Compose and Docker Buildx"
    assert "install docker-compose-plugin docker-buildx-plugin" in error.fix


def test_what_does_not_answer_in_time_is_not_missing(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ANSWER_S", 0.2)
    bare.engine("docker.io")
    bare.has("docker", 'case "$1" in buildx) while :; do :; done;; esac')
    error = ensure()
    assert (error.code, error.exit_code, bare.installed) == ("E-ENGINE", Exit.TIMED_OUT, [])
    assert "`docker buildx version` did not answer" in error.what


def test_an_engine_elsewhere_that_is_slow_is_not_missing(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ANSWER_S", 0.2)
    bare.has("docker", 'case "$1" in version) while :; do :; done;; info) exit 1;; esac')
    ensure()
    assert bare.installed == []
