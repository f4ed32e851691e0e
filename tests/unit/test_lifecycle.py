"""What the verbs ask of the engine, and what they make of its answers: with a `docker` that only writes down."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import build, down, status, up
from stack import compose, engine, images, lifecycle, preflight, process
from stack.errors import Exit, StackError
from stack.instance import ROOT, Instance
from stack.plan import load_sizing, make_plan
from stack.settings import DEFAULTS
from tests.support import gone, script, wait_until


class Docker:
    """A `docker` on the PATH: it notes each call and what it finds in its environment; its answers are files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script(
            folder / "docker",
            f"""echo "$*" >> '{folder}/calls'
case "$*" in
  compose*) env > '{folder}/env'; . '{folder}/compose' ;;
  ps*) cat '{folder}/ids' ;;
  inspect*) cat '{folder}/containers' ;;
  volume*) cat '{folder}/volumes' ;;
  image*) exit 1 ;;
esac""",
        )
        for name in ("calls", "compose", "ids", "containers", "volumes"):
            (folder / name).touch()

    def has(self, *containers: dict[str, Any]) -> None:
        """What `docker inspect` shows."""
        (self.folder / "ids").write_text("\n".join(str(one["Id"]) for one in containers))
        (self.folder / "containers").write_text(json.dumps(containers))

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        """Of the last Compose call."""
        return dict(line.split("=", 1) for line in (self.folder / "env").read_text().splitlines() if "=" in line)


def container(
    service: str, state: str = "running", *, code: int = 0, ours: bool = True, **labels: str
) -> dict[str, Any]:
    """A container of the project `ours`, as `docker inspect` shows it; labels of the project with their last words."""
    compose_labels = {"project": "ours", "service": service, "config-hash": "h"}
    compose_labels |= {f"project.{name}": value for name, value in labels.items()}
    own = {f"com.docker.compose.{name}": value for name, value in compose_labels.items()}
    return {
        "Id": service,
        "Name": f"/ours-{service}-1",
        "State": {"Status": state, "ExitCode": code},
        "Config": {"Labels": own | ({"stack.config": "x"} if ours else {}), "Image": "x"},
        "RestartCount": 0,
    }


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Docker(tmp_path / "bin")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    """An instance with a plan and secrets; the programs take it for the current one."""
    made = Instance(tmp_path / "instance")
    made.secrets.mkdir(parents=True)
    values = {"COMPOSE_PROJECT_NAME": "ours", "COMPOSE_FILE": f"{ROOT}/compose.yaml", "COMPOSE_PROFILES": ""}
    values |= {"STACK_NAME": "ours", "BIND_ADDRESS": "127.0.0.1", "SECRETS_DIR": str(made.secrets)}
    made.env_file.write_text(compose.render_environment(values))
    monkeypatch.setenv("STACK_DIR", str(made.directory))
    return made


@pytest.mark.parametrize("verb", ["capture", "down", "logs"])
def test_the_shell_does_not_choose_the_stack(
    docker: Docker, prepared: Instance, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """What is exported for another project, or by another tool, does not reach Compose: .env's word counts."""
    exported = {"COMPOSE_PROJECT_NAME": "shop", "COMPOSE_PROFILES": "debug", "COMPOSE_IGNORE_ORPHANS": "1"}
    for name, value in (exported | {"BIND_ADDRESS": "0.0.0.0", "TERM": "vt100"}).items():
        monkeypatch.setenv(name, value)
    if verb == "capture":
        compose.Compose(prepared).capture("config")
    elif verb == "down":
        lifecycle.down(prepared)
    else:
        subprocess.run([sys.executable, ROOT / "scripts/compose.py", "logs"], check=True)
    seen = docker.environment
    assert (seen["COMPOSE_PROJECT_NAME"], seen["COMPOSE_PROFILES"], seen["COMPOSE_IGNORE_ORPHANS"]) == ("ours", "", "0")
    assert (seen["BIND_ADDRESS"], seen["TERM"]) == ("127.0.0.1", "vt100")
    assert all("--project-name ours" in call for call in docker.calls if call.startswith("compose"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize(("words", "told"), [([], "nothing is lost"), (["--volumes", "--yes", "1"], "may be deleted")])
def test_an_interrupted_stop_stops_compose_too(
    docker: Docker, prepared: Instance, number: signal.Signals, words: list[str], told: str
) -> None:
    """By Ctrl-C, by a service manager, by a closed terminal: nothing goes on behind the operator's back."""
    pid_file = docker.folder / "pid"
    (docker.folder / "compose").write_text(f"echo $$ > '{pid_file}.new'; mv '{pid_file}.new' '{pid_file}'; sleep 30")
    child = subprocess.Popen(
        [sys.executable, ROOT / "scripts/down.py", *words],
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C is ignored in what a script started with `&`, a closed terminal in what `nohup` did.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_until(pid_file.exists, 20, "Compose's start")
    child.send_signal(number)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, gone(int(pid_file.read_text()))) == (130, True), said
    assert told in said.splitlines()[-1], said
    assert prepared.env_file.exists(), "the next attempt knows what to delete"


def test_compose_that_does_not_end_is_killed() -> None:
    """A time-out, not a traceback, is what the operator is told."""
    child = process.Child(["sh", "-c", "trap '' TERM; echo ready; sleep 20"], {})
    wait_until(lambda: child.tail(1), 5, "the trap set")
    child.stop(patience=0.2)
    assert child.poll() == -signal.SIGKILL


def test_a_full_disk_does_not_keep_a_stack_from_stopping(
    docker: Docker, prepared: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to stop; Compose's last words are told from memory, however much it says."""
    monkeypatch.setattr(tempfile, "TemporaryFile", raising(OSError(errno.ENOSPC, "No space left on device")))
    lifecycle.down(prepared)
    (docker.folder / "compose").write_text("yes | head -n 100000; echo its last words; exit 7")
    with pytest.raises(StackError) as error:
        lifecycle.down(prepared)
    assert error.value.why.splitlines() == [*["y"] * 7, "its last words"]


def test_a_stop_that_takes_too_long_says_what_it_waited_for(
    docker: Docker, prepared: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with 4, as every wait does that runs out, and with 1 where Compose itself failed."""
    docker.has(container("airflow-worker"), container("redis"))
    (docker.folder / "compose").write_text("echo its last words; exit 7")
    with pytest.raises(StackError, match="stop airflow-worker ended with code 7") as error:
        lifecycle.down(prepared)
    assert (error.value.exit_code, error.value.why) == (Exit.FAILED, "its last words")
    monkeypatch.setattr(lifecycle, "STOP_GRACE_S", -99)
    (docker.folder / "compose").write_text("echo its last words; sleep 30")
    with pytest.raises(StackError, match="stop airflow-worker was not done in time") as error:
        lifecycle.down(prepared)
    assert (error.value.code, error.value.exit_code) == ("E-DOWN", Exit.TIMED_OUT)
    assert error.value.why == "after 1 s still waiting for: airflow-worker\nits last words"


def raising(error: Exception) -> Callable[..., None]:
    """A function that fails."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("service", "state", "code", "good"),
    [
        ("redis", "running", 0, True),
        ("redis", "exited", 0, False),
        ("redis", "paused", 0, False),
        ("minio-init", "exited", 0, True),
        ("minio-init", "exited", 1, False),
    ],
)
def test_only_a_job_may_have_ended(
    docker: Docker, prepared: Instance, service: str, state: str, code: int, good: bool
) -> None:
    """`docker stop` ends a service with code 0: `make status` ends with 1 then, and `make up` starts it again."""
    docker.has(container(service, state, code=code))
    (docker.folder / "compose").write_text(f"echo {service} h")
    assert lifecycle.is_current(compose.Compose(prepared)) is good
    assert status.main([]) == (0 if good else 1)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("permission denied while trying to connect to the Docker daemon socket", "E-ENGINE-ACCESS"),
        ("Cannot connect to the Docker daemon. Is the docker daemon running?", "E-ENGINE"),
    ],
)
@pytest.mark.parametrize("verb", [status, down], ids=["status", "down"])
@pytest.mark.usefixtures("prepared")
def test_an_engine_that_does_not_answer_is_told_as_that(docker: Docker, verb: Any, said: str, code: str) -> None:
    """By every command, not only by `make up`."""
    (docker.folder / "docker").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    with pytest.raises(StackError) as error:
        verb.main([])
    assert (error.value.code, error.value.exit_code, error.value.why) == (code, Exit.PRECONDITION, said)


def test_an_engine_that_goes_away_meanwhile_is_no_unmet_precondition(docker: Docker, prepared: Instance) -> None:
    """Exit code 3 would say that nothing was changed."""
    stack = compose.Compose(prepared)
    assert stack.containers() == []
    (docker.folder / "docker").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(StackError) as error:
        stack.containers()
    assert (error.value.code, error.value.exit_code) == ("E-COMMAND", Exit.FAILED)


def started(docker: Docker, env_file: Path) -> None:
    """A container of the stack with this .env."""
    docker.has(container("redis", environment_file=str(env_file)))


def refused(docker: Docker, code: str, *words: str) -> StackError:
    """`make down` (or clean) ends with this code, and has changed nothing."""
    with pytest.raises(StackError) as error:
        down.main(words)
    assert (error.value.code, error.value.exit_code) == (code, Exit.PRECONDITION)
    assert not [call for call in docker.calls if not call.startswith(("ps", "inspect"))]
    return error.value


@pytest.mark.parametrize("words", [[], ["--volumes", "--yes", "1"]], ids=["down", "clean"])
def test_a_copy_does_not_stop_the_original(docker: Docker, prepared: Instance, words: list[str]) -> None:
    """`cp -a`, then `make clean` in the copy: refused, whether or not the original runs; the error says the way out."""
    copy = prepared.directory.with_name("copy")
    shutil.copytree(prepared.directory, copy)
    os.environ["STACK_DIR"] = str(copy)
    assert "STACK_NAME" in refused(docker, "E-NOT-YOURS", *words).fix
    started(docker, prepared.env_file)
    assert str(prepared.directory) in refused(docker, "E-NOT-YOURS", *words).why
    # With paths of its own, and the original's name all the same.
    text = prepared.env_file.read_text()
    (copy / ".env").write_text(text.replace(str(prepared.directory), str(copy)))
    refused(docker, "E-NOT-YOURS", *words)
    os.environ["STACK_DIR"] = str(prepared.directory)
    assert down.main(words) == 0, "the original is its own"


def test_up_does_not_take_over_anothers_stack(
    docker: Docker, prepared: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is written; with a name of its own the check lets a copy pass."""
    monkeypatch.setattr(preflight, "before_engine", lambda *_: [])
    monkeypatch.setattr(engine, "ensure", lambda *_, **__: None)
    here = Instance(prepared.directory.with_name("copy"))
    shutil.copytree(prepared.directory, here.directory)
    here.settings_file.write_text("STACK_NAME=ours\n")
    before = here.env_file.read_text()
    with pytest.raises(StackError) as error:
        lifecycle.up(here)
    assert error.value.code == "E-NOT-YOURS"
    assert here.env_file.read_text() == before
    assert not [call for call in docker.calls if not call.startswith("ps")]
    compose.check_owner(here, "its-own")


@pytest.mark.parametrize(("source", "asked"), [("build", [2, 2]), ("pull", [0, 2])])
@pytest.mark.usefixtures("docker")
def test_room_is_asked_for_the_images_that_are_due(
    prepared: Instance, monkeypatch: pytest.MonkeyPatch, source: str, asked: list[int]
) -> None:
    """By `make up`, which pulls them where it is told to, and by `make build`."""
    seen: list[int] = []

    def note(*_: object, to_build: int) -> None:
        seen.append(to_build)
        raise LookupError

    monkeypatch.setattr(preflight, "before_engine", lambda *_: [])
    monkeypatch.setattr(engine, "ensure", lambda *_, **__: None)
    monkeypatch.setattr(images, "missing", lambda *_: ["redis", "mlflow"])
    monkeypatch.setattr(preflight, "with_engine", note)
    monkeypatch.setattr(preflight, "check_engine_disk", note)
    prepared.settings_file.write_text(f"STACK_NAME=ours\nIMAGE_SOURCE={source}\n")
    with pytest.raises(LookupError):
        lifecycle.prepare(prepared)
    with pytest.raises(LookupError):
        build.main([])
    assert seen == asked


@pytest.mark.parametrize("left", ["containers", "volumes", "nothing", "another's"])
def test_a_renamed_stack_does_not_leave_the_old_one_behind(
    docker: Docker, prepared: Instance, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Running or stopped: refused before anything is written. The .env of a copy tells of the original's."""
    monkeypatch.setattr(preflight, "before_engine", lambda *_: [])
    monkeypatch.setattr(engine, "ensure", lambda *_, **__: None)
    # What comes next in `prepare`.
    monkeypatch.setattr(images, "tags", raising(LookupError()))
    here = prepared
    if left == "another's":
        here = Instance(prepared.directory.with_name("copy"))
        shutil.copytree(prepared.directory, here.directory)
    if left in ("containers", "another's"):
        # Of the new name there are none: the answers are not the project's.
        (docker.folder / "docker").write_text(
            (docker.folder / "docker").read_text().replace("ps*)", "ps*project=new) ;;\n  ps*)")
        )
        started(docker, prepared.env_file)
    if left == "volumes":
        (docker.folder / "volumes").write_text("ours_postgres\n")
    here.settings_file.write_text("STACK_NAME=new\n")
    before = {path: path.read_text() for path in (here.settings_file, here.env_file)}
    if left in ("nothing", "another's"):
        with pytest.raises(LookupError):
            lifecycle.prepare(here)
    else:
        with pytest.raises(StackError, match=r"STACK_NAME=new, but the stack of .* is ours") as error:
            lifecycle.prepare(here)
        assert (error.value.code, error.value.exit_code) == ("E-SETTING", Exit.PRECONDITION)
        here.settings_file.write_text("STACK_NAME=ours\n")
        with pytest.raises(LookupError):
            lifecycle.prepare(here)
        here.settings_file.write_text("STACK_NAME=new\n")
    assert {path: path.read_text() for path in before} == before
    assert list(here.secrets.iterdir()) == []


@pytest.mark.parametrize("labels", [{}, {"working_dir": "/srv/shop"}, {"environment_file": "/srv/shop/gone.env"}])
def test_another_compose_project_of_the_same_name_is_none_of_ours(
    docker: Docker, prepared: Instance, labels: dict[str, str]
) -> None:
    docker.has(container("web", ours=False, **labels))
    for words in ([], ["--volumes", "--yes", "1"]):
        assert "ours-web-1" in refused(docker, "E-NOT-YOURS", *words).why
    prepared.env_file.unlink()
    prepared.settings_file.write_text("STACK_NAME=ours\n")
    refused(docker, "E-NOT-YOURS", "--volumes", "--yes", "1")


def test_a_renamed_directory_keeps_its_stack(docker: Docker, prepared: Instance) -> None:
    """Running or not: the error names `make up`; with the paths written anew everything is as before."""
    here = Instance(prepared.directory.with_name("renamed"))
    prepared.directory.rename(here.directory)
    os.environ["STACK_DIR"] = str(here.directory)
    for run in (docker.has, lambda: started(docker, prepared.env_file)):
        run()
        assert "make up" in refused(docker, "E-MOVED").fix
        compose.check_owner(here, "ours")
    here.env_file.write_text(here.env_file.read_text().replace(str(prepared.directory), str(here.directory)))
    assert down.main([]) == 0


@pytest.mark.parametrize("damage", ["moved", "not whole"])
def test_clean_needs_no_plan_that_fits(docker: Docker, prepared: Instance, damage: str) -> None:
    """Else `make init`, refused for want of a secret, and `make clean` would send the operator to one another."""
    started(docker, prepared.env_file)
    here = prepared
    if damage == "moved":
        here = Instance(prepared.directory.with_name("renamed"))
        prepared.directory.rename(here.directory)
        os.environ["STACK_DIR"] = str(here.directory)
    else:
        prepared.env_file.write_text("STACK_NAME='ours'\n")
        refused(docker, "E-NO-INIT")
    here.settings_file.write_text("STACK_NAME=ours\n")
    assert down.main(["--volumes", "--yes", "1"]) == 0
    assert "rm --force redis" in docker.calls
    assert not here.env_file.exists()


@pytest.mark.usefixtures("prepared")
def test_a_directory_that_may_not_be_looked_into_is_not_lost(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's stack: nothing of it is seen from here but its containers."""
    theirs = Path("/home/them/mlstack/.env")
    started(docker, theirs)
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path == theirs:
            raise PermissionError
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    refused(docker, "E-NOT-YOURS", "--volumes", "--yes", "1")


def test_what_compose_made_by_hand_in_the_clone_is_the_clones(docker: Docker) -> None:
    """`docker compose up postgres` (docs/upgrade.md): without --env-file there is no label of one."""
    docker.has(container("postgres", working_dir=str(ROOT)))
    compose.check_owner(Instance(ROOT), "ours")


@pytest.mark.parametrize("step", ["prepare", "ensure", "down", "start"])
@pytest.mark.usefixtures("prepared")
def test_a_restart_stops_only_what_will_start_again(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """`make restart` checks and builds first: what fails there leaves the stack as it runs."""
    done = []

    def note(name: str, answer: object) -> Callable[..., object]:
        def call(*_: object, **__: object) -> object:
            done.append(name)
            if name == step:
                raise StackError("E-X", "refused", why="", fix="")
            return answer

        return call

    found = lifecycle.Prepared(DEFAULTS, make_plan(load_sizing(), 8192, 2), {}, [])
    monkeypatch.setattr(lifecycle, "prepare", note("prepare", found))
    monkeypatch.setattr(images, "ensure", note("ensure", []))
    monkeypatch.setattr(lifecycle, "down", note("down", None))
    monkeypatch.setattr(lifecycle, "start", note("start", None))
    recipe = ["make", "--no-print-directory", "--dry-run", "restart"]
    *_, program = process.capture(recipe, timeout=20, cwd=ROOT).out.splitlines()
    assert program.split()[1:2] == ["scripts/up.py"]
    with pytest.raises(StackError, match="refused"):
        up.main(program.split()[2:])
    order = ["prepare", "ensure", "down", "start"]
    assert done == order[: order.index(step) + 1]


@pytest.mark.parametrize(("service", "stopped"), [("mlflow", True), ("serving", True), ("flower", False)])
@pytest.mark.parametrize("wanted", [True, False])
def test_tasks_end_before_what_they_need_is_replaced(
    docker: Docker, prepared: Instance, service: str, stopped: bool, *, wanted: bool
) -> None:
    """Or removed, where a setting was turned off; the worker is left alone where they do not need it."""
    now = [container("airflow-worker"), container(service)]
    docker.has(*now)
    later = json.loads(json.dumps(now if wanted else now[:1]))
    later[-1]["Config"]["Labels"]["com.docker.compose.config-hash"] = "new" if wanted else "h"
    (docker.folder / "later").write_text(json.dumps(later))
    (docker.folder / "compose").write_text(f"""case "$*" in
  *'config --hash'*) echo airflow-worker h; {f"echo {service} new" if wanted else ":"} ;;
  *'config --services'*) echo airflow-worker; echo {service} ;;
  *' up '*) cp '{docker.folder}/later' '{docker.folder}/containers' ;;
esac
""")
    lifecycle.start(compose.Compose(prepared))
    ends = [call for call in docker.calls if " stop " in f"{call} " or " rm " in call or " up " in call]
    verbs = [next(word for word in ("stop", "rm", "up") if f" {word} " in f"{call} ") for call in ends]
    assert verbs == [*(["stop"] if stopped else []), *([] if wanted else ["rm"]), "up"]


def test_a_missing_image_is_told_before_compose_looks_for_it(docker: Docker, prepared: Instance) -> None:
    with prepared.env_file.open("a") as file:
        file.write("IMAGE_PREFIX='mlstack'\nAIRFLOW_TAG='1'\n")
    command = [sys.executable, ROOT / "scripts/compose.py", "run", "--rm", "airflow-cli", "dag-lint"]
    said = process.capture(command, timeout=20, check=False)
    assert said.code == Exit.PRECONDITION
    assert "error[E-IMAGE]: this engine does not have mlstack/airflow:1" in said.err
    assert docker.calls == ["image inspect mlstack/airflow:1"]
