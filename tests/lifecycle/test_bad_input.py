"""Bad input is refused with a code and a way out, before anything changes. No stack is started."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import compose, secrets
from stack.instance import ROOT
from stack.settings import DEFAULTS
from tests.support import Run, run, script

PROJECT = "mlstack-refused"


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    directory = tmp_path / "an instance"
    directory.mkdir()
    return directory


def make(instance: Path, *words: str, env: dict[str, str] | None = None) -> Run:
    """`make` for an instance, without a terminal."""
    done = subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=ROOT,
        env={**os.environ, "STACK_DIR": str(instance), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Run(done.returncode, done.stdout + done.stderr, 0)


def init(instance: Path, *lines: str, env: dict[str, str] | None = None) -> Run:
    """`make init` with these lines in the instance's stack.env."""
    (instance / "stack.env").write_text("\n".join([f"STACK_NAME={PROJECT}", *lines]) + "\n")
    return make(instance, "init", env=env)


def assert_refused(said: Run, instance: Path, code: str, *texts: str) -> None:
    """make ended with 3's failure, the error names code, why, fix and these texts, nothing was written."""
    assert said.code != 0, said.output
    assert f"error[{code}]" in said.output, said.output
    assert "Error 3" in said.output, said.output
    for text in ("why:", "fix:", *texts):
        assert text in said.output, said.output
    assert "\x1b[" not in said.output, "no colours without a terminal"
    assert not (instance / ".env").exists()
    assert not (instance / "secrets").exists()


FREE = ("AIRFLOW_PORT=18080", "MLFLOW_PORT=15000")


def test_a_good_instance_is_accepted_and_a_second_init_changes_nothing(instance: Path) -> None:
    """The twin of all refusals below; and the second run says that there was nothing to do."""
    said = init(instance, *FREE)
    assert said.code == 0, said.output
    files = [instance / ".env", *sorted((instance / "secrets").iterdir())]
    assert {path.name for path in files[1:]} == {*secrets.PRIMARY, *secrets.derived_names()}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    again = init(instance, *FREE)
    assert "nothing to do" in again.output, again.output
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before


def test_a_port_in_use(instance: Path) -> None:
    """The message names the setting and the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(init(instance, f"AIRFLOW_PORT={port}", FREE[1]), instance, "E-PORT", f"AIRFLOW_PORT={port}")


def test_too_little_memory(instance: Path) -> None:
    """A budget of 2 GiB is refused with the figure that is needed, to the MiB that settles it."""
    assert_refused(init(instance, *FREE, "STACK_MEMORY=2g"), instance, "E-MEM-LOW", "2,048 MiB", "needs 3,472 MiB")


def test_more_memory_than_the_host_has(instance: Path) -> None:
    assert_refused(init(instance, *FREE, "STACK_MEMORY=900g"), instance, "E-MEM-LOW", "921,600 MiB")


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("MLFLOW_PROT=5001", ("unknown key MLFLOW_PROT", "MLFLOW_PORT")),
        ("STACK_MEMORY=lots", ("STACK_MEMORY=lots", "not a size")),
        ("MLFLOW_PORT=70000", ("MLFLOW_PORT=70000", "not a port")),
        ("BIND_ADDRESS=0.0.0.0", ("only loopback",)),
        ("FLOWER=perhaps", ("FLOWER=perhaps",)),
        ("just words", ("is not KEY=value",)),
        ("DAGS_GIT_URL=git@git.example:dags.git", ("ssh://user@host/path",)),
        ("DAGS_GIT_URL=https://me:hidden@git.example/x", ("https://me:...@git.example/x", "secrets/dags_git_token")),
        ("DAGS_GIT_SUBDIR=../x", ("not a folder in the repository",)),
    ],
)
def test_a_malformed_setting(instance: Path, line: str, texts: tuple[str, ...]) -> None:
    """The message names the line and what would be right."""
    assert_refused(init(instance, FREE[0], line), instance, "E-SETTING", *texts)


def test_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    """On a real file system of 16 MiB."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)).code != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        assert_refused(init(small, *FREE), small, "E-DISK", "MiB are free at")
    finally:
        run("umount", str(small))


def test_an_engine_that_does_not_answer(instance: Path) -> None:
    """An engine elsewhere (DOCKER_HOST) is never installed or started from here."""
    said = init(instance, *FREE, env={"DOCKER_HOST": f"unix://{instance}/no-such.sock"})
    assert_refused(said, instance, "E-ENGINE")


@pytest.mark.parametrize(
    ("server", "client", "text"),
    [
        ("20.10.24", "2.26.1", "Engine 20.10.24"),
        ("26.1.5", "2.17.3", "Compose 2.17.3"),
        ("26.1.5", "", "not installed"),
    ],
)
def test_an_engine_that_is_too_old(instance: Path, tmp_path: Path, server: str, client: str, text: str) -> None:
    """A `docker` that reports an old version stands in for an old engine, which cannot be had here."""
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    script(
        fake,
        f'case "$*" in\n"compose version"*) [ -n "{client}" ] || exit 1; echo "{client}";;\n'
        '"buildx version") echo "github.com/docker/buildx v0.13.1 x";;\n'
        f'"version"*) echo "{server}";;\n'
        f"""info*) echo '{{"ServerVersion":"{server}","MemTotal":25000000000,"NCPU":2,"MemoryLimit":true}}';;\n"""
        "*) exit 1;;\nesac",
    )
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    code = "E-ENGINE-OLD" if client else "E-ENGINE"
    assert_refused(init(instance, *FREE, "INSTALL_ENGINE=never", env=env), instance, code, text)


def test_missing_dags_folder(instance: Path) -> None:
    assert_refused(init(instance, *FREE, f"DAGS_DIR={instance}/nowhere"), instance, "E-DAGS-DIR", "nowhere")


def test_a_repository_for_dags_that_cannot_be(instance: Path) -> None:
    """A folder that is not there, and ssh without a key; what asks the repository itself is in test_git_dags."""
    said = init(instance, *FREE, f"DAGS_GIT_URL=file://{instance.parent}/nowhere")
    assert_refused(said, instance, "E-DAGS-GIT", "is not a directory")
    said = init(instance, *FREE, "DAGS_GIT_URL=ssh://git@git.example/dags.git")
    assert_refused(said, instance, "E-DAGS-GIT-LOGIN", "secrets/dags_git_key")


def test_clean_without_a_terminal_needs_yes(instance: Path) -> None:
    """Deleting data is never done by accident: nothing goes without a person or YES=1."""
    assert init(instance, *FREE).code == 0
    refused = make(instance, "clean")
    assert "error[E-CONFIRM]" in refused.output, refused.output
    assert (instance / "secrets" / "fernet_key").exists()
    allowed = make(instance, "clean", "YES=1")
    assert allowed.code == 0, allowed.output
    assert not (instance / "secrets").exists()


class TestSecrets:
    """Damaged secrets, beside a volume that stands for the data written with them."""

    @pytest.fixture
    def prepared(self, instance: Path) -> Iterator[Path]:
        assert init(instance, *FREE).code == 0
        volume = f"{PROJECT}_postgres"
        run("docker", "volume", "create", "--label", f"com.docker.compose.project={PROJECT}", volume)
        try:
            assert compose.volumes(PROJECT) == [volume]
            yield instance
        finally:
            run("docker", "volume", "rm", volume)

    @pytest.mark.parametrize(
        ("damage", "code"),
        [("missing", "E-SECRET-LOST"), ("empty", "E-SECRET"), ("unreadable", "E-SECRET")],
    )
    def test_damage_is_refused_and_nothing_is_regenerated(self, prepared: Path, damage: str, code: str) -> None:
        """The message names the secret; the others keep their content."""
        victim = prepared / "secrets" / "fernet_key"
        others = {path: path.read_bytes() for path in (prepared / "secrets").iterdir() if path != victim}
        victim.unlink()
        if damage == "empty":
            victim.write_text("")
        elif damage == "unreadable":
            # Root may read anything: bytes that are no text are unreadable for everybody.
            victim.write_bytes(b"\xff\xfe\xfa")
        said = init(prepared, *FREE)
        assert f"error[{code}]" in said.output, said.output
        assert "fernet_key" in said.output, said.output
        assert "Error 3" in said.output, said.output
        assert {path: path.read_bytes() for path in others} == others
        assert victim.exists() is (damage != "missing")


def test_clean_deletes_nothing_by_a_name_alone(instance: Path) -> None:
    """A directory that was never a stack's, a mistyped STACK_DIR, and a name that another directory's stack has."""
    other = instance.parent / "other"
    other.mkdir()
    (other / ".env").touch()
    volume, label = f"{PROJECT}_postgres", "com.docker.compose.project"
    image = run("docker", "image", "ls", "--quiet", "*/postgres").output.split()[0]
    run("docker", "volume", "create", "--label", f"{label}={PROJECT}", volume)
    environment_file = f"{label}.environment_file={other / '.env'}"
    words = ["docker", "create", *("--label", f"{label}={PROJECT}", "--label", environment_file)]
    words += ["--label", "stack.config=x", image]
    container = run(*words).output.strip()

    try:
        assert_refused(make(instance, "clean", f"YES={PROJECT}"), instance, "E-NOT-YOURS", "has no stack")
        (instance / "stack.env").write_text(f"STACK_NAME={PROJECT}\n")
        assert_refused(make(instance, "clean", f"YES={PROJECT}"), instance, "E-NOT-YOURS", f"belong to {other}")
        assert compose.volumes(PROJECT) == [volume]
        (other / ".env").unlink()
        assert make(instance, "clean", f"YES={PROJECT}").code == 0, "the directory is lost, and this one has its name"
        assert compose.volumes(PROJECT) == []
    finally:
        run("docker", "rm", "--force", container)
        run("docker", "volume", "rm", "--force", volume)


def test_clean_is_the_way_out_when_a_stacks_directory_is_lost(instance: Path) -> None:
    """A volume without .env and secrets, as another clone that is stopped has it, too: `make up` refuses, `make clean`
    removes it when told its stack's name, `make init` goes on."""
    volume = f"{PROJECT}_postgres"
    run("docker", "volume", "create", "--label", f"com.docker.compose.project={PROJECT}", volume)
    try:
        assert "error[E-SECRET-LOST]" in init(instance, *FREE).output
        refused = make(instance, "clean", "YES=1")
        assert "error[E-CONFIRM]" in refused.output, refused.output
        assert f"make clean YES={PROJECT}" in refused.output
        assert compose.volumes(PROJECT) == [volume]
        cleaned = make(instance, "clean", f"YES={PROJECT}")
        assert cleaned.code == 0, cleaned.output
        assert compose.volumes(PROJECT) == []
    finally:
        run("docker", "volume", "rm", "--force", volume)
    assert init(instance, *FREE).code == 0


def test_volumes_of_another_postgres_major() -> None:
    """The server refuses a volume of Postgres 16 and leaves it as it is."""
    from stack import images

    tags = images.tags(DEFAULTS)
    image = images.name(DEFAULTS, "postgres", tags["postgres"])
    volume = f"{PROJECT}_old"
    run("docker", "volume", "create", volume)
    mount = f"{volume}:/var/lib/postgresql"
    try:
        for layout in ("16/data", "."):
            made = run(
                *("docker", "run", "--rm", "--user", "root", "--entrypoint", "bash", "--volume", mount, image, "-c"),
                f"rm -rf /var/lib/postgresql/*; mkdir -p /var/lib/postgresql/{layout}; "
                f"echo 16 > /var/lib/postgresql/{layout}/PG_VERSION",
            )
            assert made.code == 0, made.output
            said = run("docker", "run", "--rm", "--volume", mount, image)
            assert said.code == 3, said.output
            assert "error[E-PG-MAJOR]" in said.output
            assert "Postgres 16" in said.output
            left = run(
                "docker",
                "run",
                "--rm",
                "--entrypoint",
                "find",
                "--volume",
                mount,
                image,
                "/var/lib/postgresql",
                "-type",
                "f",
            )
            assert [line.rsplit("/", 1)[1] for line in left.output.split()] == ["PG_VERSION"], left.output
    finally:
        run("docker", "volume", "rm", volume)
