"""What happens inside a task's process: protection, limits, admission, and the last words.

An Airflow plugin (entry point `airflow.plugins`) whose listener is this module. All of it is public
API: the listener hooks, BaseOperator's `resources` and `pre_execute`, and Airflow's exceptions.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.listeners import hookimpl

from taskguard import linux, output, protocol

TASK_SCORE = 1000
"""Tasks are the kernel's first choice, always."""
NICENESS = 19
"""Within the worker's container tasks yield to Celery and to the guard: a fork bomb of 800 processes
left the guard one hundredth of a CPU otherwise. Other containers do not notice the difference."""
COME_BACK_S = 5
"""When a task gave its slot back for want of memory."""
STANDARD_OUTPUT = 1
TURN_S = 150.0
"""More than the guard lets anyone wait without a word (guard.WAIT_S)."""

log = logging.getLogger("taskguard")
_link: socket.socket | None = None
_instance: dict[str, Any] = {}
"""This task's name."""


def _is_task(component: object) -> bool:
    return type(component).__name__ == "TaskRunnerMarker"


def _ask(message: dict[str, Any], descriptors: list[int] | None = None) -> dict[str, Any]:
    """The guard's answer; empty while there is no guard: the task goes on, limited by what was set."""
    global _link
    for _ in range(2):
        try:
            if _link is None:
                _link = protocol.connect()
            return protocol.ask(_link, message, descriptors)
        except (OSError, ValueError):
            if _link is not None:
                _link.close()
            _link = None
    return {}


@hookimpl
def on_starting(component: object) -> None:
    """Before the DAG file is read."""
    if not _is_task(component):
        return
    parent = os.getppid()
    # What is inherited is not looked through by this process's collector, and so not copied.
    gc.freeze()
    linux.die_with_parent(parent)
    linux.adopt_orphans()
    linux.set_oom_score(TASK_SCORE)
    os.nice(NICENESS)
    # Celery marks its pool processes as daemons, which may not use multiprocessing; a task may.
    with contextlib.suppress(AssertionError):
        multiprocessing.current_process().daemon = False
    output.bound()
    os.register_at_fork(after_in_child=_forked)
    from structlog.contextvars import get_contextvars

    known = get_contextvars()
    keys = ("dag_id", "task_id", "run_id", "map_index", "try_number")
    _instance.update({key: known.get(key, -1) for key in keys})
    # Its own, not sys.stdout's: the pool process reads it until nobody holds it open any more.
    _ask({"op": "start", "instance": _instance}, [STANDARD_OUTPUT])


def _forked() -> None:
    """In a Python process that the task forked: lets the guard see what it does not share, and makes it
    end when asked to."""
    global _link
    # It inherits the task runner's handler, which ignores SIGTERM in any process but its own: the end of
    # a multiprocessing.Pool would wait for it for ever.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _link is not None:
        _link.close()
        _link = None
    with contextlib.suppress(OSError):
        descriptor = linux.open_own_details()
        try:
            protocol.tell({"op": "forked"}, [descriptor])
        finally:
            os.close(descriptor)


@hookimpl
def on_task_instance_running(previous_state: object, task_instance: Any) -> None:
    """Before `execute`: asks for the memory that the task declares, and waits for it if it must."""
    task = task_instance.task
    resources = getattr(task, "resources", None)
    ram = resources.ram.qty if resources is not None else None
    answer = _admission(ram, stays=_goes_on(task_instance))
    # Airflow runs these before it tells a listener of the failure.
    for kind in ("on_failure_callback", "on_retry_callback"):
        if callbacks := getattr(task, kind, None):
            setattr(task, kind, [_before_callbacks, *callbacks])
    for note in answer.get("notes", []):
        log.warning("%s", note)
    if "granted" in answer:
        log.info("Memory budget: %s MiB (%s)", answer["granted"], answer["source"])
    elif "never" in answer or "later" in answer:
        # An exception here would only be logged; one from pre_execute decides.
        _instead(task, answer)


def _goes_on(task_instance: Any) -> bool:
    """Whether this is the second half of a task that was deferred, or waited for a person: what it was woken
    with is lost if it is sent away, and it would begin anew."""
    context = getattr(task_instance, "_ti_context_from_server", None)
    return bool(getattr(context, "next_method", None))


def _admission(ram: int | None, *, stays: bool) -> dict[str, Any]:
    """The guard's last word, after as much waiting as it takes."""
    while True:
        answer = _ask({"op": "admit", "ram": ram, "stays": stays, "instance": _instance})
        while "wait" in answer:
            log.info("%s", answer["wait"])
            answer = _turn()
        if "later" not in answer or not stays:
            return answer
        # The guard went away meanwhile. It comes back within seconds; without one the task goes on.
        time.sleep(COME_BACK_S)


def _turn() -> dict[str, Any]:
    """Waits at the door until the guard decides. Airflow's heartbeats go on, execution_timeout does
    not run yet."""
    if _link is None:
        return {}
    try:
        _link.settimeout(TURN_S)
        answer, _ = protocol.receive(_link)
        _link.settimeout(protocol.PATIENCE_S)
    except (OSError, ValueError):
        return {"later": True}
    # No guard any more: come again when it is back.
    return answer if answer is not None else {"later": True}


def _instead(task: Any, answer: dict[str, Any]) -> None:
    """Makes the task end before `execute`."""

    def refuse(context: object) -> None:
        from airflow.sdk.exceptions import AirflowFailException, AirflowRescheduleException

        if "never" in answer:
            raise AirflowFailException(answer["never"])
        log.info("Still no memory for this task: it gives its slot back, keeps its place, and comes again")
        raise AirflowRescheduleException(datetime.now(tz=timezone.utc) + timedelta(seconds=COME_BACK_S))

    task.pre_execute = refuse


def _ran_out(error: object) -> bool:
    """Whether an exception is, or comes from, a MemoryError."""
    seen: set[int] = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        if isinstance(error, MemoryError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _before_callbacks(context: Any) -> None:
    """Gets memory and time for the callbacks of a task that ran out of memory."""
    _ask({"op": "explain", "memory_error": _ran_out(context.get("exception"))})


@hookimpl
def on_task_instance_failed(previous_state: object, task_instance: object, error: object) -> None:
    """The last words: if memory was the reason, what to do about it."""
    text = _ask({"op": "explain", "memory_error": _ran_out(error)}).get("text")
    if text:
        log.error("%s", text)


@hookimpl
def before_stopping(component: object) -> None:
    """When all is said: the peak."""
    if _is_task(component):
        _ask({"op": "end"})
