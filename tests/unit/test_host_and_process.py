"""Reading the host, running programs, writing .env, naming images."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from stack import compose, engine, host, images, preflight, process
from stack.errors import Exit, StackError, run_main
from stack.instance import ROOT, write
from stack.settings import DEFAULTS
from tests.support import gone, script, wait_until


def tree(base: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)


GIB = 2**30


@pytest.mark.parametrize(
    ("cgroup", "files", "mib"),
    [
        ("0::/a/b\n", {}, 8192),
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": str(3 * GIB), "a/b/memory.max": "max"}, 3072),
        ("0::/a/b\n", {"a/memory.max": str(3 * GIB), "a/b/memory.max": str(2 * GIB)}, 2048),
        ("0::/a\n", {"a/memory.max": str(64 * GIB)}, 8192),
        ("5:memory:/a\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 8192),
        ("5:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": str(GIB)}, 1024),
        # In a container the path may be the host's: the limit is at the root.
        ("5:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": str(GIB)}, 1024),
    ],
)
def test_memory_is_the_lowest_limit_that_binds_us(tmp_path: Path, cgroup: str, files: dict[str, str], mib: int) -> None:
    """MemTotal, or a cgroup's limit, ours or a parent's, v1 or v2."""
    tree(tmp_path / "proc", {"meminfo": "MemTotal:        8388608 kB\nMemFree: 1 kB\n", "self/cgroup": cgroup})
    tree(tmp_path / "cgroup", files)
    assert host.memory_mib(tmp_path / "proc", tmp_path / "cgroup") == mib


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("26.1.5+dfsg1", (26, 1)), ("v2.26.1-4", (2, 26)), ("20.10.24", (20, 10)), ("", ()), ("x", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert engine.version(text) == numbers


def test_the_engine_found_here_is_accepted_and_older_ones_are_not() -> None:
    """Each requirement by itself turns an accepted engine into a refused one."""
    good = engine.Engine("26.1.5", "2.26.1", 8192, 2, "/var/lib/docker", memory_limits=True)
    engine.require(good)
    for change in ({"server": "24.0.9"}, {"compose": "2.25.0"}, {"compose": ""}, {"memory_limits": False}):
        with pytest.raises(StackError) as refused:
            engine.require(engine.Engine(**{**good.__dict__, **change}))
        assert refused.value.exit_code == Exit.PRECONDITION


def test_a_missing_command_and_a_failing_one() -> None:
    for words, text in ((["no-such-program"], "not installed"), (["sh", "-c", "echo oh >&2; exit 7"], "oh")):
        with pytest.raises(StackError) as error:
            process.capture(words, timeout=5)
        assert text in error.value.why
        assert error.value.changed == "what was done before that stays"
    assert process.capture(["sh", "-c", "exit 7"], timeout=5, check=False).code == 7


def test_a_time_out_of_a_captured_command_ends_it(tmp_path: Path) -> None:
    """Exit 4 where it is checked, code 124 where the caller decides; the child is gone either way."""
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > '{pid_file}'; exec sleep 60"]
    with pytest.raises(StackError, match="sleep 60") as error:
        process.capture(command, timeout=0.3)
    assert error.value.exit_code == Exit.TIMED_OUT
    assert gone(int(pid_file.read_text()))
    assert process.capture(command, timeout=0.3, check=False).code == 124
    assert gone(int(pid_file.read_text()))


def test_what_is_secret_goes_by_stdin_or_environment() -> None:
    """Both doors exist, so that no argument needs to hold a secret; without them stdin is empty."""
    assert process.capture(["cat"], timeout=5, stdin="s3cret").out == "s3cret"
    assert process.capture(["cat"], timeout=5).out == ""
    assert process.capture(["sh", "-c", 'echo "$S"'], timeout=5, env={"S": "s3cret"}).out == "s3cret\n"


def test_streamed_lines_come_one_by_one_with_stderr_among_them() -> None:
    lines: list[str] = []
    assert process.stream(["sh", "-c", "echo a; echo b >&2; exit 5"], timeout=5, on_line=lines.append) == 5
    assert lines == ["a", "b"]


@pytest.mark.parametrize(
    "script",
    ["trap '' TERM; sleep 20", "sleep 20 & exit 0"],
    ids=["a child that ignores SIGTERM", "an orphan that holds the output"],
)
def test_a_time_out_is_a_bound(script: str) -> None:
    """Whatever the command does, the call returns soon after its time-out."""
    started = time.monotonic()
    with pytest.raises(StackError):
        process.stream(["sh", "-c", script], timeout=0.3, on_line=lambda _: None)
    assert time.monotonic() - started < 10


def test_a_time_out_ends_the_whole_group(tmp_path: Path) -> None:
    """A command that does not end in time is ended with its children, and the program exits 4."""
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(StackError) as error:
        process.stream(
            ["sh", "-c", f"sleep 30 & echo $! > '{pid_file}'; echo started; wait"], timeout=0.5, on_line=lambda _: None
        )
    assert time.monotonic() - started < 10
    assert error.value.exit_code == Exit.TIMED_OUT
    grandchild = int(pid_file.read_text())
    wait_until(lambda: gone(grandchild), 5, "the grandchild's end")


def test_env_files_keep_spaces_and_refuse_quotes() -> None:
    values = {"A": "/a path/with # signs", "B": "", "C": "x=y"}
    assert compose._parse_environment(compose.render_environment(values)) == values
    for bad in ("it's", "two\nlines"):
        with pytest.raises(StackError, match="quote or a line break"):
            compose.render_environment({"A": bad})


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path: Path) -> None:
    """stack.env is the operator's: it is never without its content, and keeps its mode, its owner and a link to it."""
    file, link = tmp_path / "stack.env", tmp_path / "link"
    file.write_text("AIRFLOW_PORT=8081\n")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1234, 1235)
    before = file.stat()
    link.symlink_to(file)
    # Python ignores SIGXFSZ: the kernel refuses what makes a file larger than 4 bytes.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limit[1]))
    try:
        with pytest.raises(OSError):
            write(link, "AIRFLOW_PORT=8082\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_text() == "AIRFLOW_PORT=8081\n"
    write(link, "AIRFLOW_PORT=8082\n")
    assert file.read_text() == link.read_text() == "AIRFLOW_PORT=8082\n"
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, file]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two commands at once: each writes its own text whole, and none fails for want of what the other has moved."""
    texts = [f"{number}\n" * 1000 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: [write(tmp_path / ".env", text) for _ in range(50)], texts))
    assert (tmp_path / ".env").read_text() in texts
    assert list(tmp_path.iterdir()) == [tmp_path / ".env"]


def test_a_new_file_has_the_mode_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / ".env", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o640


def test_errors_say_what_why_fix_and_what_was_changed() -> None:
    text = str(StackError("E-X", "what", why="why\nmore", fix="fix", changed="nothing"))
    assert text == (
        "error[E-X]: what\n  why: why\n       more\n  fix: fix\n  changed: nothing. more: docs/errors.md#e-x"
    )


def test_a_full_disk_is_an_error_with_a_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system refuses is told as everything else is, with the file's name; the program ends with 1."""
    # Ours stay as they are.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def main(_: Sequence[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/srv/.env")

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    told = capsys.readouterr().err
    assert (ended.value.code, "error[E-OS]" in told, "is full" in told) == (Exit.FAILED, True, True)
    assert "No space left on device: '/srv/.env'" in told


def test_several_errors_are_told_at_once() -> None:
    with pytest.raises(StackError) as error:
        preflight.raise_all([StackError("E-A", "a", why="", fix=""), StackError("E-B", "b", why="", fix="")])
    assert "error[E-A]" in str(error.value)
    assert "error[E-B]" in str(error.value)
    preflight.raise_all([])


def test_disk_and_architecture(tmp_path: Path) -> None:
    preflight.check_disk(tmp_path / "not" / "yet", 1, "x")
    with pytest.raises(StackError, match="are free at"):
        preflight.check_disk(tmp_path, 2**40, "x")
    here = host.read()
    preflight.check_architecture(here)
    with pytest.raises(StackError, match="riscv64"):
        preflight.check_architecture(host.Host(**{**here.__dict__, "architecture": "riscv64"}))


def test_tags_follow_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file gives its image a new tag and the others their old one; the base concerns all."""
    shutil.copytree(ROOT / "dockerfiles", tmp_path / "dockerfiles")
    monkeypatch.setattr(images, "DOCKERFILES", tmp_path / "dockerfiles")
    before = images.tags(DEFAULTS)
    assert images.tags(DEFAULTS) == before
    assert before["mlflow"].startswith("3.17.2-")
    with (tmp_path / "dockerfiles/redis/Dockerfile").open("a") as file:
        file.write("# more\n")
    changed = {name for name, tag in images.tags(DEFAULTS).items() if tag != before[name]}
    assert changed == {"redis"}
    with (tmp_path / "dockerfiles/base/with-secrets").open("a") as file:
        file.write("# more\n")
    assert all(tag != before[name] for name, tag in images.tags(DEFAULTS).items())


def test_tags_follow_the_operators_packages_and_base(tmp_path: Path) -> None:
    """The user's requirements concern Airflow's image alone; another base image concerns all."""
    (tmp_path / "requirements.txt").write_text("")
    chosen = DEFAULTS.model_copy(update={"dags_dir": str(tmp_path)})
    before = images.tags(chosen)
    (tmp_path / "requirements.txt").write_text("polars\n")
    assert {name for name, tag in images.tags(chosen).items() if tag != before[name]} == {"airflow"}
    (tmp_path / "requirements.txt").write_text("")
    assert images.tags(chosen) == before
    other = images.tags(chosen.model_copy(update={"base_image": "registry.example.com/debian:13"}))
    assert all(tag != before[name] for name, tag in other.items())
    (tmp_path / "environments").mkdir()
    (tmp_path / "environments/README").write_text("no environment\n")
    (tmp_path / "environments/.heavy.txt.swp").write_text("an editor's\n")
    assert images.tags(chosen) == before, "nothing that becomes an environment is there"
    (tmp_path / "environments/heavy.txt").write_text("polars\n")
    heavy = images.tags(chosen)
    assert {name for name, tag in heavy.items() if tag != before[name]} == {"airflow"}
    (tmp_path / "environments/heavy.txt").rename(tmp_path / "environments/other.txt")
    assert images.tags(chosen)["airflow"] != heavy["airflow"]
    (tmp_path / "requirements.txt").unlink()
    with pytest.raises(StackError, match=r"requirements\.txt does not exist"):
        images.tags(chosen)


def test_the_build_reads_files_outside_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CA bundle and DAGS_DIR may be anywhere; newer versions of bake refuse that unless they are told."""
    monkeypatch.setattr(images, "VAR", tmp_path)
    monkeypatch.setattr(images, "base_image", lambda *_: "debian")
    seen: dict[str, str] = {}
    monkeypatch.setattr(images, "stream", lambda *_, env, **__: seen.update(env) or 0)
    images.build(host.read(), DEFAULTS, {"redis": "1"})
    assert seen["BUILDX_BAKE_ENTITLEMENTS_FS"] == "0"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what the `docker` on the PATH does for anything but `image inspect`: it has no image."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "docker", f"[ \"$1\" = image ] && exit 1\n. '{folder}/does'")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder / "does"


USER = host.Host(8192, 2, "x86_64", "debian", "13", root=False, systemd=True)


def test_a_base_image_that_was_asked_for_is_not_replaced(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the operator names is refused with docker's words; in place of the default one, ours is made."""
    made = []
    monkeypatch.setattr(images, "bootstrap_base", lambda *_: made.append("base"))
    docker.write_text("echo 'manifest unknown' >&2; exit 1")
    named = DEFAULTS.model_copy(update={"base_image": "registry.example.com/debian:13"})
    with pytest.raises(StackError, match=r"BASE_IMAGE=registry\.example\.com/debian:13 could not be pulled") as refused:
        images.base_image(replace(USER, root=True), named)
    assert (refused.value.code, refused.value.exit_code) == ("E-BASE-IMAGE", Exit.FAILED)
    assert refused.value.why == "manifest unknown"
    assert made == []
    assert images.base_image(replace(USER, root=True), DEFAULTS) == images.BOOTSTRAPPED
    assert made == ["base"]
    docker.write_text("exit 0")
    assert images.base_image(USER, named) == "registry.example.com/debian:13"


def test_no_base_image_is_no_unmet_precondition(docker: Path) -> None:
    """`make up` has written settings and secrets by then: its code must not say that nothing was changed."""
    docker.write_text("exit 1")
    with pytest.raises(StackError, match="no registry gave") as error:
        images.base_image(USER, DEFAULTS)
    assert (error.value.code, error.value.exit_code) == ("E-BASE-IMAGE", Exit.FAILED)
    assert "settings, secrets" in error.value.changed


@pytest.mark.parametrize(
    ("does", "code", "why"),
    [("echo denied >&2; exit 1", Exit.FAILED, "denied"), ("exec sleep 30", Exit.TIMED_OUT, "no answer within 0.3 s")],
)
def test_a_registry_that_refuses_and_one_that_does_not_answer(
    docker: Path, monkeypatch: pytest.MonkeyPatch, does: str, code: Exit, why: str
) -> None:
    monkeypatch.setattr(images, "_TRANSFER_TIMEOUT_S", 0.3)
    docker.write_text(does)
    with pytest.raises(StackError, match="docker pull mlstack/redis:1 failed") as error:
        images.pull(DEFAULTS, {"redis": "1"})
    assert (error.value.code, error.value.exit_code, error.value.why) == ("E-REGISTRY", code, why)
