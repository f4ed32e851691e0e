"""The verbs: prepare, start, stop. Each checks first, acts then, and can be run again at any moment."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stack import compose, dags, engine, host, images, preflight, secrets, settings
from stack.compose import Compose, Container
from stack.console import Step, say
from stack.errors import Exit, StackError
from stack.instance import ROOT, Instance, write
from stack.plan import Plan
from stack.process import Child, capture

UP_PATIENCE_S = 420
"""A start from empty volumes took 40 s on 2 cores; a slow disk may need ten times that."""
STOP_GRACE_S = 600
"""A worker that is replaced may let its tasks end first (stop_grace_period in compose/airflow.yaml)."""
UP_ATTEMPTS = 3
WORKER = "airflow-worker"
NEEDED_BY_TASKS = {WORKER, "airflow-apiserver", "postgres", "redis", "minio", "mlflow", "serving"}
"""What a running task cannot end without."""


@dataclass(frozen=True)
class Prepared:
    """What `init` found and wrote."""

    settings: settings.Settings
    plan: Plan
    tags: dict[str, str]
    written: list[str]


def prepare(instance: Instance) -> Prepared:
    """Checks the host, then writes stack.env, the plan and the secrets where they are not current."""
    chosen = settings.load(instance.settings_file)
    found = host.read()
    preflight.raise_all(preflight.before_engine(found, chosen, instance))
    running = engine.ensure(found, may_install=chosen.install_engine == "auto")
    compose.check_owner(instance, chosen.stack_name)
    _check_renamed(instance, chosen.stack_name)
    tags = images.tags(chosen)
    due = images.missing(chosen, images.needed(chosen, tags))
    to_build = len(due) if chosen.image_source == "build" else 0
    preflight.raise_all(preflight.with_engine(found, chosen, running, to_build=to_build))
    missing = secrets.check(instance.secrets, data_exists=bool(compose.volumes(chosen.stack_name)))
    plan = preflight.plan_for(found, chosen, running)
    if "airflow" not in due:
        _check_dags(instance, chosen, tags)

    # --- From here on files are written. ---
    instance.directory.mkdir(parents=True, exist_ok=True)
    written = []
    if not instance.settings_file.exists():
        write(instance.settings_file, settings.render_defaults())
        written.append(instance.settings_file.name)
    written += [f"secrets/{name}" for name in secrets.ensure(instance.secrets, chosen, missing)]
    values = compose.environment(instance, chosen, plan, tags) | {
        "SECRETS_DIGEST": _digest(instance.secrets, only=set(secrets.names()) - set(dags.SECRETS)),
        "CONFIG_DIGEST": _digest(ROOT / "config"),
    }
    if chosen.dags_git_url:
        values["DAGS_GIT_DIGEST"] = _digest(instance.secrets, only=dags.SECRETS)
    text = compose.render_environment(values)
    if not instance.env_file.exists() or instance.env_file.read_text(encoding="utf-8") != text:
        write(instance.env_file, text)
        written.append(instance.env_file.name)
    _hand_over(instance)
    return Prepared(chosen, plan, tags, written)


def _check_renamed(instance: Instance, name: str) -> None:
    """Raises StackError (E-SETTING) where the stack of this directory was made with another STACK_NAME, and is there.

    It would run on, or its volumes lie, where no command of this directory reaches them.
    """
    before = compose.recorded(instance).get("STACK_NAME", name)
    if before == name:
        return
    try:
        compose.check_owner(instance, before)
    except StackError as error:
        if error.code != "E-NOT-YOURS":
            raise
        # The .env came with a copy of another's directory, which gets a name of its own here.
        return
    if not (compose.containers(before) or compose.volumes(before)):
        return
    raise StackError(
        "E-SETTING",
        f"STACK_NAME={name}, but the stack of {instance.directory} is {before}",
        why=f"containers or volumes of {before} are there; they do not take another name, and would be left behind",
        fix=f"write STACK_NAME={before} into stack.env again.\n"
        "For a second stack: a directory of its own (STACK_DIR; docs/operate.md, several stacks on one host).\n"
        f"To begin anew as {name}: `make clean` deletes {before} with all its data, then `make up`",
    )


def _check_dags(instance: Instance, chosen: settings.Settings, tags: dict[str, str], *, late: bool = False) -> None:
    """Asks the DAGs' repository, if there is one. It takes Airflow's image; `late`: that had to be made first."""
    if not chosen.dags_git_url:
        return
    planned = instance.env_file.read_text(encoding="utf-8") if instance.env_file.exists() else ""
    dags.check(
        chosen,
        secrets.given(instance.secrets),
        images.name(chosen, "airflow", tags["airflow"]),
        accepted=not late and dags.variables(chosen)["DAG_BUNDLE_STORAGE"] in planned,
        changed="the plan, the secrets and the images; no container" if late else "nothing",
    )


def summary(written: list[str]) -> str:
    """What `init` wrote, in a few words: files by name, secrets by number."""
    files = [name for name in written if not name.startswith("secrets/")]
    count = len(written) - len(files)
    return ", ".join([*files, *([f"{count} secrets"] if count else [])])


def _digest(folder: Path, *, only: Collection[str] = ()) -> str:
    """Changes when any file of a folder does: containers are made anew when what they mount changed.

    With names in `only`: when one of these does.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / name for name in only] or folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _hand_over(instance: Instance) -> None:
    """Under sudo: gives what was written to the owner of the instance's directory."""
    if os.geteuid() != 0:
        return
    owner = instance.directory.stat()
    if owner.st_uid == 0:
        return
    mine = [instance.settings_file, instance.env_file, instance.secrets, *secrets.files(instance.secrets)]
    for path in mine:
        os.chown(path, owner.st_uid, owner.st_gid)


def up(instance: Instance, *, restart: bool = False) -> Prepared:
    """Brings the stack up and returns when every service is healthy; with `restart` all of it is stopped before.

    What is refused, or cannot be built or pulled, is known before anything is stopped.
    """
    prepared = prepare(instance)
    if prepared.written:
        say(f"init: wrote {summary(prepared.written)}")
    if "airflow" in images.ensure(host.read(), prepared.settings, prepared.tags):
        _check_dags(instance, prepared.settings, prepared.tags, late=True)
    stack = Compose(instance)
    if restart:
        down(instance)
    elif is_current(stack):
        say("nothing to do: every service is healthy and as configured")
        return prepared
    start(stack)
    return prepared


def is_current(stack: Compose) -> bool:
    """Whether every service runs as configured and is healthy, and every job has ended well."""
    wanted, now = stack.hashes(), stack.containers()
    return wanted.keys() == {container.service for container in now} == _ready(now, wanted)


def _ready(now: Iterable[Container], wanted: Mapping[str, str]) -> set[str]:
    """The services that run as configured and are healthy, or are jobs that ended well; `wanted` has their hashes.

    One that is about to be replaced is not ready.
    """
    return {one.service for one in now if one.good and one.config_hash == wanted.get(one.service)}


def start(stack: Compose) -> None:
    """Starts what is not running as configured and waits until all of it is healthy.

    Raises StackError (E-UNHEALTHY) with each unhappy service's last words.
    """
    hashes, before = stack.hashes(), stack.containers()
    wanted, watch = set(hashes), _Watch(stack, hashes)
    patience = UP_PATIENCE_S + (STOP_GRACE_S if before else 0)
    attempts = 1
    if NEEDED_BY_TASKS & {one.service for one in before if one.config_hash != hashes.get(one.service)}:
        with Step("letting running tasks end") as progress:
            _drain(stack, progress)
    # Compose leaves an opt-in service running when its setting is turned off. What no file declares any more is an
    # orphan, which `up` removes.
    if unwanted := {one.service for one in before} - wanted & set(stack.declared()):
        stack.capture("--profile", "*", "rm", "--stop", "--force", *sorted(unwanted), timeout=120)
    with Step(f"starting {len(wanted)} services") as progress:
        up_command = stack.command("up", "--detach", "--remove-orphans", "--no-build")
        child = Child(up_command, stack.variables)
        deadline = time.monotonic() + patience
        try:
            while True:
                ended = child.poll()
                now = {container.service: container for container in stack.containers()}
                waiting = sorted(wanted - _ready(now.values(), hashes))
                left = f"; waiting for {', '.join(waiting)}" if waiting else ""
                progress.update(f"{len(wanted) - len(waiting)} of {len(wanted)} ready{left}")
                if ended == 0 and not waiting:
                    return
                if ended not in (None, 0) and attempts < UP_ATTEMPTS and not compose.failed(now.values()):
                    # No service failed: the engine lost a race ("No such container", of one that runs).
                    attempts += 1
                    child = Child(up_command, stack.variables)
                    continue
                if ended not in (None, 0):
                    said = f"docker compose up ended with code {ended}: {child.tail(3)}"
                    raise compose.not_healthy(stack, said, Exit.FAILED)
                watch.look(now)
                if time.monotonic() > deadline:
                    raise compose.not_healthy(
                        stack, f"after {patience:.0f} s still waiting for: {', '.join(waiting)}", Exit.TIMED_OUT
                    )
                # A look costs 0.08 CPU-seconds, which the services want.
                time.sleep(1)
        finally:
            child.stop()


class _Watch:
    """Tells a service that will not become healthy by waiting from one that needs a moment.

    While its database is made anew, an old container may restart or be unhealthy: only what happens
    to a container of the wanted configuration counts, and only when it lasts.
    """

    RESTARTS = 3
    UNHEALTHY_S = 90

    def __init__(self, stack: Compose, wanted: dict[str, str]) -> None:
        self._stack = stack
        self._wanted = wanted
        self._restarts: dict[str, int] = {}
        self._unhealthy_since: dict[str, float] = {}

    def look(self, now: dict[str, Container]) -> None:
        """Raises StackError (E-UNHEALTHY) for a service that keeps ending or stays unhealthy."""
        for container in now.values():
            if container.config_hash != self._wanted.get(container.service):
                continue
            first = self._restarts.setdefault(container.id, container.restarts)
            if container.health == "unhealthy":
                since = self._unhealthy_since.setdefault(container.id, time.monotonic())
            else:
                since = time.monotonic()
                self._unhealthy_since.pop(container.id, None)
            if container.restarts - first >= self.RESTARTS or time.monotonic() - since > self.UNHEALTHY_S:
                raise compose.not_healthy(self._stack, f"{container.service} does not stay up", Exit.FAILED)


def down(instance: Instance, *, volumes: bool = False) -> None:
    """Stops and removes the containers; with `volumes` the data as well."""
    stack = Compose(instance)
    compose.check_owner(instance, stack.project)
    words = ["down", "--remove-orphans", *(["--volumes"] if volumes else [])]
    # Opt-in services are stopped whatever the setting says now.
    title = "stopping and deleting all data" if volumes else "stopping (data is kept)"
    with Step(title) as progress:
        if not volumes:
            _drain(stack, progress)
        _end(stack, progress, ["--profile", "*", *words])
    if volumes:
        # Compose removes what its files declare now; a setting that is off again may have left more.
        for name in compose.volumes(stack.project):
            capture(["docker", "volume", "rm", name], timeout=60)


def _drain(stack: Compose, progress: Step) -> None:
    """Stops the worker, whose tasks may end first, while all that they need is still there. Compose stops it together
    with the API server and MLflow: each of its tasks that took longer than these was lost, and run again."""
    _end(stack, progress, ["stop", WORKER], only=WORKER)


def _end(stack: Compose, progress: Step, words: list[str], *, only: str = "") -> None:
    """Runs a Compose command that ends all containers, or `only` a service's, and says which it waits for.

    Raises StackError (E-DOWN).
    """
    child = Child(stack.command(*words), stack.variables)
    patience = STOP_GRACE_S + 100
    deadline = time.monotonic() + patience
    late = False
    try:
        while (code := child.poll()) is None:
            left = [one.service for one in stack.containers() if only in ("", one.service)]
            progress.update(f"waiting for {', '.join(left)}")
            if late := time.monotonic() > deadline:
                break
            time.sleep(0.3)
    finally:
        child.stop()
    if code != 0:
        waited = f"after {patience:.0f} s still waiting for: {', '.join(left) or 'Compose itself'}\n" if late else ""
        raise StackError(
            "E-DOWN",
            f"docker compose {' '.join(words)} {'was not done in time' if late else f'ended with code {code}'}",
            why=waited + child.tail(8),
            fix="run the same command again; `docker ps` shows what is left",
            changed="some containers may be gone",
            exit_code=Exit.TIMED_OUT if late else Exit.FAILED,
        )


def addresses(prepared: Prepared, instance: Instance, *, show_password: bool) -> str:
    """Where the pages are and how to log in the first time."""
    chosen = prepared.settings
    password_file = instance.secrets / "admin_password"
    password = (
        password_file.read_text(encoding="utf-8").strip() if show_password else f"in {os.path.relpath(password_file)}"
    )
    lines = [
        f"Airflow   {chosen.airflow_url}   (API server, formerly webserver)",
        f"MLflow    {chosen.mlflow_url}",
    ]
    if chosen.flower == "on":
        lines.append(f"Flower    http://{chosen.host}:{chosen.flower_port}   (password in secrets/flower_password)")
    if chosen.serving == "on":
        lines.append(f"Serving   {chosen.serving_url}   (token in secrets/serving_token; make predict)")
    lines += [
        f"login     {chosen.admin_user}, password {password}",
        "next      make demo (a training pipeline) · make status · make help",
    ]
    return "\n".join(lines)
