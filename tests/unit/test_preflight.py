"""The preflight refuses what would fail later, tells all of it at once, and changes nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest

from stack import host, lifecycle, preflight, settings
from stack.engine import Engine
from stack.errors import Exit, StackError
from stack.host import Host
from stack.instance import ROOT, Instance
from tests.support import free_ports, hidden_folder, script

HOST = Host(8192, 2, "x86_64", "debian", "13", root=False, systemd=True)
ENGINE = Engine("26.1.5", "2.26.1", 8192, 2, "/no/such/root", memory_limits=True)


def codes(errors: list[StackError]) -> list[str]:
    return [error.code for error in errors]


@pytest.fixture
def listener() -> Iterator[int]:
    """A port on loopback that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def fake_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that prints the content of a file, whatever it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "docker", f"cat '{folder}/answer'")
    (folder / "answer").touch()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder / "answer"


def test_a_good_host_passes(tmp_path: Path) -> None:
    assert preflight.before_engine(HOST, settings.DEFAULTS, Instance(tmp_path)) == []


def test_a_used_port_is_refused_and_a_free_one_is_not(listener: int) -> None:
    """The message names the setting, the port and the address."""
    with pytest.raises(StackError, match=f"MLFLOW_PORT={listener} is in use on 127.0.0.1") as refused:
        preflight.check_port("MLFLOW_PORT", "127.0.0.1", listener)
    assert refused.value.code == "E-PORT"
    # The same port of another address is another one.
    preflight.check_port("MLFLOW_PORT", "127.0.0.2", listener)


@pytest.mark.usefixtures("fake_docker")
def test_somebody_elses_port_is_told(listener: int) -> None:
    # The default ports may be in use on this host: a stack may well run here.
    chosen = settings.parse(f"AIRFLOW_PORT={listener}\nMLFLOW_PORT={free_ports(1)[0]}")
    (error,) = preflight.with_engine(HOST, chosen, ENGINE, to_build=0)
    assert error.code == "E-PORT"
    assert f"AIRFLOW_PORT={listener}" in error.what


def test_ports_of_our_own_containers_are_no_obstacle(listener: int, fake_docker: Path) -> None:
    """Else a second `make up` would refuse what the first one started; by address and port, v4 and v6."""
    fake_docker.write_text(f"5432/tcp\n127.0.0.1:{listener}->8080/tcp\n9000/tcp, [::1]:5000->5000/tcp\n")
    assert preflight._own_ports("x") == {listener, 5000}
    assert preflight.with_engine(HOST, settings.parse(f"AIRFLOW_PORT={listener}"), ENGINE, to_build=0) == []


def test_ports_of_pages_that_are_off_do_not_count() -> None:
    assert set(settings.DEFAULTS.ports) == {"AIRFLOW_PORT", "MLFLOW_PORT"}
    assert settings.parse("FLOWER=on\nFLOWER_PORT=5556").ports["FLOWER_PORT"] == 5556
    assert settings.parse("SERVING=on\nSERVING_PORT=5003").ports["SERVING_PORT"] == 5003


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    """Architecture, memory, two folders and the CA bundle: five problems, one run."""
    chosen = settings.parse(f"DAGS_DIR={tmp_path}/none\nPLUGINS_DIR={tmp_path}/none\nCA_BUNDLE={tmp_path}/none.pem")
    small = replace(HOST, architecture="riscv64", memory=2048)
    errors = preflight.before_engine(small, chosen, Instance(tmp_path))
    # The DAG folder lacks its requirements.txt as well.
    assert sorted(codes(errors)) == sorted(["E-ARCH", "E-MEM-LOW", *["E-DAGS-DIR"] * 3, "E-CA-BUNDLE"])
    with pytest.raises(StackError) as told:
        preflight.raise_all(errors)
    assert all(f"error[{error.code}]: {error.what}" in str(told.value) for error in errors)
    assert told.value.exit_code == Exit.PRECONDITION


def test_a_missing_folder_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=f"DAGS_DIR={tmp_path}/none") as refused:
        preflight.check_folder(f"{tmp_path}/none", "DAGS_DIR")
    assert "mkdir -p" in refused.value.fix
    (tmp_path / "file").touch()
    with pytest.raises(StackError, match="is not a directory"):
        preflight.check_folder(f"{tmp_path}/file", "DAGS_DIR")
    preflight.check_folder("./dags", "DAGS_DIR")


@pytest.mark.parametrize("closed", ["", "a", "a/b.py", "c.sql"])
def test_what_containers_cannot_read_is_refused(tmp_path: Path, closed: str) -> None:
    """The folder itself, one in it, or a file: as a clone made with umask 077 has all of them."""
    folder = tmp_path / "the dags"
    (folder / "a").mkdir(parents=True)
    (folder / "requirements.txt").touch()
    for name in ("a/b.py", "c.sql", ".env"):
        (folder / name).touch()
    # A person's own, and a link's target, which containers see as something of theirs.
    (folder / ".env").chmod(0o600)
    (tmp_path / "private").touch(0o600)
    (folder / "link").symlink_to(tmp_path / "private")
    chosen = settings.parse(f"DAGS_DIR={folder}")
    assert preflight.before_engine(HOST, chosen, Instance(tmp_path)) == []
    (folder / closed).chmod(0o700)
    (error,) = preflight.before_engine(HOST, chosen, Instance(tmp_path))
    assert (error.code, error.what) == ("E-READ", f"containers cannot read {folder / closed}")
    assert error.fix == f"chmod -R go+rX '{folder}'"
    run(["sh", "-c", error.fix], check=True)
    assert preflight.before_engine(HOST, chosen, Instance(tmp_path)) == []


def test_what_is_airflows_own_need_not_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dag.py").touch(0o600)
    tmp_path.chmod(0o700)
    with pytest.raises(StackError):
        preflight.check_readable(tmp_path)
    monkeypatch.setattr(preflight, "AIRFLOW_USER", os.geteuid())
    preflight.check_readable(tmp_path)


@pytest.mark.parametrize("content", [None, "", "not a certificate"])
def test_a_ca_bundle_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)
    errors = preflight.before_engine(HOST, settings.parse(f"CA_BUNDLE={tmp_path}/ca.pem"), Instance(tmp_path))
    assert codes(errors) == ["E-CA-BUNDLE"]


def test_a_quote_in_the_path_is_refused(tmp_path: Path) -> None:
    """Compose's .env could not carry it."""
    errors = preflight.before_engine(HOST, settings.DEFAULTS, Instance(tmp_path / "it's here"))
    assert codes(errors) == ["E-PATH"]


@pytest.mark.parametrize("key", ["STACK_DIR", "DAGS_DIR", "PLUGINS_DIR"])
def test_a_colon_in_a_path_is_refused(tmp_path: Path, key: str) -> None:
    """Compose would read two paths."""
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "requirements.txt").touch()
    chosen = settings.DEFAULTS if key == "STACK_DIR" else settings.parse(f"{key}={folder}")
    errors = preflight.before_engine(HOST, chosen, Instance(folder if key == "STACK_DIR" else tmp_path))
    assert codes(errors) == ["E-PATH"]
    assert key in errors[0].what


@pytest.mark.parametrize(("memory", "text"), [("2g", "STACK_MEMORY is 2,048 MiB; the stack needs"), ("9g", "host has")])
def test_stack_memory_must_carry_the_stack_and_fit_the_host(memory: str, text: str) -> None:
    with pytest.raises(StackError, match=text) as refused:
        preflight.plan_for(HOST, settings.parse(f"STACK_MEMORY={memory}"))
    assert refused.value.code == "E-MEM-LOW"
    assert "STACK_MEMORY" in refused.value.fix


def test_stack_memory_is_the_stacks_own() -> None:
    """What the operator sets aside is planned whole; without it the host keeps its reserve."""
    assert preflight.plan_for(HOST, settings.parse("STACK_MEMORY=6g")).budget == 6144
    assert preflight.plan_for(HOST, settings.DEFAULTS).budget < 8192


def test_a_smaller_engine_rules() -> None:
    """On Docker Desktop the virtual machine's memory and CPUs count, not the laptop's."""
    small = replace(ENGINE, memory=4200, cpus=1)
    assert preflight.plan_for(HOST, settings.DEFAULTS, small).memory == 4200
    assert preflight.plan_for(HOST, settings.DEFAULTS, small).cpus == 1
    assert preflight.plan_for(HOST, settings.parse("STACK_CPUS=1.5"), small).cpus == 1.5
    with pytest.raises(StackError, match="this host has"):
        preflight.plan_for(HOST, settings.parse("STACK_MEMORY=6g"), small)


def test_a_full_engine_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all images need is not asked for again when one is due; another machine's engine shows no disk here."""
    engine = replace(ENGINE, root_dir=str(tmp_path))

    def passes(free_gib: float, to_build: int) -> bool:
        monkeypatch.setattr(preflight, "free_disk_mib", lambda _: int(free_gib * 1024))
        errors = preflight._collect([lambda: preflight.check_engine_disk(engine, to_build=to_build)])
        assert codes(errors) in ([], ["E-DISK"])
        return not errors

    for to_build, need_gib in {0: 3, 1: 3, 2: 6, 6: 12, 7: 12}.items():
        assert passes(need_gib, to_build), f"{to_build} images"
        assert not passes(need_gib - 0.1, to_build), f"{to_build} images"
    preflight.check_engine_disk(ENGINE, to_build=7)


def test_what_may_not_be_looked_at_is_no_traceback(tmp_path: Path) -> None:
    """The engine's data in somebody's home, a clone below one: not seen, or refused, as what is not there."""
    with hidden_folder(tmp_path) as hidden:
        preflight.check_engine_disk(replace(ENGINE, root_dir=str(hidden)), to_build=7)
        preflight.check_disk(hidden, 1, "x")
        with pytest.raises(StackError) as refused:
            preflight.check_writable(hidden)
    assert refused.value.code == "E-WRITE"


def test_a_refused_prepare_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that cannot be used, then an engine that does not answer: the instance stays as it was."""
    instance = Instance(tmp_path / "instance")
    monkeypatch.setattr(host, "read", lambda: HOST)
    # An engine that the operator points at is never installed or started by us.
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(StackError) as refused:
        lifecycle.prepare(instance)
    assert refused.value.code == "E-ENGINE"
    assert not instance.directory.exists()

    instance.directory.mkdir()
    instance.settings_file.write_text("AIRFLOW_PORT=x\n")
    with pytest.raises(StackError) as refused:
        lifecycle.prepare(instance)
    assert refused.value.code == "E-SETTING"
    assert list(instance.directory.iterdir()) == [instance.settings_file]


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    """Containers are made anew when what they mount changes, and only then."""
    (tmp_path / "a").write_text("1")
    first = lifecycle._digest(tmp_path)
    assert lifecycle._digest(tmp_path) == first
    (tmp_path / "a").write_text("2")
    second = lifecycle._digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, lifecycle._digest(tmp_path)}) == 3
    # What concerns one service alone is counted for it alone.
    (tmp_path / "own").write_text("1")
    others, own = lifecycle._digest(tmp_path, only=["b"]), lifecycle._digest(tmp_path, only=["own"])
    (tmp_path / "own").write_text("2")
    assert lifecycle._digest(tmp_path, only=["b"]) == others
    assert lifecycle._digest(tmp_path, only=["own"]) != own
    assert lifecycle._digest(ROOT / "config") == lifecycle._digest(ROOT / "config")
