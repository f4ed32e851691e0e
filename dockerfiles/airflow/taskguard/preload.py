"""Loaded by the Celery worker before its pool forks (`imports` in extra_celery_config).

Imports once, in the parent, what every task would import for itself: a task's private memory falls
from 35 to 18 MB and its CPU from 0.3 to 0.06 s. Spares each task a heartbeat at its very start. Starts
the guard and keeps it running, tells it which pool process has which task, writes the heartbeat that
worker-probe reads, has results kept as the scheduler reads them, and clears away what uploaded logs and old versions
of the DAGs leave behind.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from celery.signals import heartbeat_sent, task_postrun, task_prerun, worker_init, worker_process_init

from taskguard import linux, protocol
from wakeup import results

HEARTBEAT = Path("/dev/shm/celery-heartbeat")
"""Touched at each heartbeat of Celery's main loop; in memory, gone with the container."""

DAGS = Path(os.environ.get("TASKGUARD_DAGS", "/opt/airflow/dags"))
"""Where the DAG files can be read before the first task; the DAG processor's copy, if they are from Git."""
POOL_PROCESS_SCORE = 200
"""Should the kernel have to choose among Celery's processes, a pool process loses one task, Celery's
main process all of them. Tasks stand far above both (listener.py)."""

# What a task process imports before the user's first line. A module that a later Airflow has no
# more is a slower task, not a broken worker.
MODULES = (
    "airflow.dag_processing.dagbag",
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.sdk.definitions.asset.metadata",
    "airflow.sdk.definitions.decorators",
    "airflow.providers.standard.operators.python",
    "airflow.providers.standard.operators.bash",
    "airflow.providers.standard.operators.empty",
    "taskguard.listener",
)

CLEAR_EVERY_S = 3600
CLEAR_AFTER_MIN = 24 * 60
"""Minutes. Long after a task's last attempt or poke: its folder must not go while a log is opened in it."""
CHECKOUTS = "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH"
"""Set where the DAGs are from Git: there each version that a task has run is a folder."""

log = logging.getLogger(__name__)
results.keep_as_json()
_guard: subprocess.Popen[bytes] | None = None
_clearing: list[subprocess.Popen[bytes]] = []
_cleared_at = -float("inf")


def imported_by(folder: Path) -> set[tuple[str, str]]:
    """What the DAG files of a folder import of Airflow and its providers: modules, and names in them or "".
    Only read, not run; a file that cannot be read is the DAG processor's to report."""
    found: set[tuple[str, str]] = set()
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {(node.module, alias.name) for alias in node.names}
    return {one for one in found if one[0].startswith(("airflow.providers.", "airflow.sdk"))}


def bundles() -> set[tuple[str, str]]:
    """The classes that bring the DAG files to a task, and their modules."""
    from airflow.configuration import conf

    paths = [one["classpath"].rpartition(".") for one in conf.getjson("dag_processor", "dag_bundle_config_list")]
    return {(module, name) for module, _, name in paths}


@worker_init.connect
def preload(**_: object) -> None:
    """Imports MODULES and what the DAGs use, and moves everything alive out of the collector's
    sight, so that a forked child does not copy pages merely by collecting garbage."""
    for module, name in (*((module, "") for module in MODULES), *sorted(bundles() | imported_by(DAGS))):
        try:
            imported = importlib.import_module(module)
            if name:
                # airflow.sdk imports most of what it offers when it is asked for it.
                getattr(imported, name, None)
        except Exception as error:
            # A provider that cannot be imported fails in its task, with a log that says so.
            log.warning("not preloaded: %s", error)
    with contextlib.suppress(ImportError, AttributeError):
        # Loads the plugins now, not in every task.
        importlib.import_module("airflow.sdk.listener").get_listener_manager()
    spare_first_heartbeat()
    keep_guard()
    gc.collect()
    gc.freeze()


def spare_first_heartbeat() -> None:
    """Has a supervisor wait for min_heartbeat_interval before its first heartbeat: it has told the API
    server of the task's start a moment before. One request of five for a small task. No public hook; where
    the supervisor is made otherwise its heartbeats are as they were."""
    try:
        from airflow.sdk.execution_time.supervisor import ActivitySubprocess

        started = ActivitySubprocess._on_child_started
        # A class of slots: one that it does not have could not be set, in any task.
        _ = ActivitySubprocess._last_heartbeat_attempt
    except (ImportError, AttributeError) as error:
        log.warning("the first heartbeat of each task is sent at once: %s", error)
        return

    def started_now(self: Any, **about: Any) -> None:
        started(self, **about)
        self._last_heartbeat_attempt = time.monotonic()

    ActivitySubprocess._on_child_started = started_now


def keep_guard() -> None:
    """Starts the guard, unless it runs."""
    global _guard
    if _guard is None or _guard.poll() is not None:
        if _guard is not None:
            log.error("the guard ended with code %s; starting it again", _guard.returncode)
        _guard = subprocess.Popen([sys.executable, "-m", "taskguard.guard"], stdin=subprocess.DEVNULL)


def clear() -> None:
    """Deletes, once an hour, the old empty files that uploaded logs leave behind, and old empty folders. A
    log that could not be uploaded is not empty, and stays. Also the checkouts of DAGs that no task uses."""
    global _clearing, _cleared_at
    _clearing = [one for one in _clearing if one.poll() is None]
    if _clearing or time.monotonic() - _cleared_at < CLEAR_EVERY_S:
        return
    _cleared_at = time.monotonic()
    from airflow.configuration import conf

    old = ["-mindepth", "1", "-mmin", f"+{CLEAR_AFTER_MIN}", "-empty", "-delete"]
    commands = [["find", conf.get_mandatory_value("logging", "base_log_folder"), *old]]
    if CHECKOUTS in os.environ:
        commands.append(["dag-checkouts"])
    _clearing = [subprocess.Popen(words, stdin=subprocess.DEVNULL) for words in commands]


@heartbeat_sent.connect
def beat(**_: object) -> None:
    """Tells worker-probe that the main loop turns, every 2 s, and looks after the guard and the disk."""
    HEARTBEAT.touch()
    keep_guard()
    clear()


@worker_process_init.connect
def enter_pool(**_: object) -> None:
    """In each new pool process. Celery has thawed the collector in the meantime."""
    gc.freeze()
    with contextlib.suppress(OSError):
        linux.set_oom_score(POOL_PROCESS_SCORE)


@task_prerun.connect
def supervise(args: Any = None, kwargs: Any = None, **_: object) -> None:
    """In a pool process that begins a task. `args` or `kwargs` hold Airflow's workload as JSON."""
    message: dict[str, Any] = {"op": "supervise"}
    with contextlib.suppress(LookupError, TypeError, ValueError):
        workload = json.loads(args[0] if args else kwargs["input"])
        if "ti" in workload:
            keys = ("dag_id", "task_id", "run_id", "map_index", "try_number")
            message["instance"] = {key: workload["ti"].get(key, -1) for key in keys}
        if workload.get("log_path"):
            from airflow.configuration import conf

            message["log"] = str(Path(conf.get_mandatory_value("logging", "base_log_folder")) / workload["log_path"])
    protocol.tell(message)


@task_postrun.connect
def finished(**_: object) -> None:
    """In a pool process that is done with a task."""
    protocol.tell({"op": "finished"})
