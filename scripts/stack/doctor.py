"""What went wrong lately, and why: the records of kernel, engine, Celery and Airflow, explained.

`Evidence` is what was read; `diagnose` is pure: evidence in, findings out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stack import observed
from stack.airflow import Airflow
from stack.compose import Compose
from stack.errors import StackError
from stack.observed import Overrun
from stack.process import Result, capture

DAY_S = 24 * 3600.0
LOG_LINES = 20000
"""Of each service; more would take longer than anyone waits."""
FAILED_TASKS = 20
"""Of the last day, latest first, whose logs are looked into."""
DISK_LEFT_MIB = 1024
RESTARTS = 3
EVENTS = 256
"""That the engine keeps, in memory; each health probe makes three."""
MEMORY_DOC = "docs/memory.md#when-a-task-needs-more"


@dataclass(frozen=True)
class Finding:
    """One thing that went wrong."""

    at: float
    """Seconds since 1970, of the last time."""
    where: str
    what: str
    why: str
    fix: str
    count: int = 1


@dataclass
class Evidence:
    """What the records say. Times are seconds since 1970."""

    since: float
    names: dict[str, str] = field(default_factory=dict)
    """Container id -> service."""
    inspected: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Service -> `docker inspect`."""
    events: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    kernel: list[tuple[float, str]] = field(default_factory=list)
    overruns: list[Overrun] = field(default_factory=list)
    killed_tasks: list[tuple[float, str]] = field(default_factory=list)
    """Tasks whose log says that a signal ended them, without an explanation of ours."""
    disk: dict[str, int] = field(default_factory=dict)
    """Path -> MiB left."""
    unread: list[str] = field(default_factory=list)
    """Records that could not be read, and why."""


# --- rules


def diagnose(evidence: Evidence) -> list[Finding]:
    """Every finding, the latest first; the same thing in the same place once, with its number."""
    rules: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
        _overruns,
        _kernel_kills,
        _ends,
        _restarts,
        _celery,
        _killed_tasks,
        _health,
        _disk,
    )
    merged: dict[tuple[str, str], Finding] = {}
    for one in sorted((finding for rule in rules for finding in rule(evidence)), key=lambda one: one.at):
        key = (one.where, one.what)
        count = one.count + (merged[key].count if key in merged else 0)
        merged[key] = Finding(one.at, one.where, one.what, one.why, one.fix, count)
    return sorted(merged.values(), key=lambda one: -one.at)


def _overruns(evidence: Evidence) -> Iterable[Finding]:
    for one in evidence.overruns:
        index = f"[{one.map_index}]" if one.map_index >= 0 else ""
        what, _, rest = one.told.partition(". ")
        yield Finding(
            one.at,
            f"task {one.dag_id}.{one.task_id}{index}",
            what.removeprefix("Out of memory: "),
            rest.split(" To give", 1)[0].split(" This worker", 1)[0],
            f"`make memory` says what to write into its DAG; {MEMORY_DOC}",
        )


_KILL = re.compile(r"oom-kill:constraint=(\w+),.*?task_memcg=(\S*?),task=([^,]*),pid=(\d+)")


def _kernel_kills(evidence: Evidence) -> Iterable[Finding]:
    for at, line in evidence.kernel:
        match = _KILL.search(line)
        if not match:
            continue
        constraint, group, name, _ = match.groups()
        service = next((service for id_, service in evidence.names.items() if id_ in group), "")
        if constraint == "CONSTRAINT_MEMCG" and service:
            yield Finding(
                at,
                service,
                f"the kernel ended a process ({name}) for want of memory",
                f"the container of {service} reached its limit",
                _more_memory(service),
            )
        elif constraint != "CONSTRAINT_MEMCG":
            yield Finding(
                at,
                service or "host",
                f"the kernel ended a process ({name}) because the whole host ran out of memory",
                "something beside the stack takes more than the plan's reserve leaves to the host",
                "set STACK_MEMORY in stack.env lower, or move the other program; `make plan` shows the reserve",
            )


def _more_memory(service: str) -> str:
    if service == "airflow-worker":
        return f"`make memory` shows which task is large; {MEMORY_DOC}"
    return "raise STACK_MEMORY in stack.env (or the host's memory), then make up: every limit grows with it"


_CODES = {
    137: ("it was killed (137)", "SIGKILL: by the kernel for want of memory, or because it did not stop in time"),
    139: ("it crashed (139)", "a segmentation fault: most often a native library"),
}


def _ends(evidence: Evidence) -> Iterable[Finding]:
    """Containers that died. One that `make down` or `make up` stopped got a signal before: that is no fault."""
    asked: dict[str, float] = {}
    for event in evidence.events:
        actor = event.get("Actor", {})
        service = str(actor.get("Attributes", {}).get("com.docker.compose.service", ""))
        id_, at, action = str(actor.get("ID", "")), event.get("timeNano", 0) / 1e9, str(event.get("Action", ""))
        if action == "kill":
            asked[id_] = at
        elif action == "oom":
            yield Finding(
                at,
                service,
                "the container reached its memory limit",
                "the engine noted an OOM event",
                _more_memory(service),
            )
        elif action == "die":
            code = int(actor.get("Attributes", {}).get("exitCode", 0))
            # `make dag-lint` and its like: a person has seen how it ended.
            by_hand = actor.get("Attributes", {}).get("com.docker.compose.oneoff") == "True"
            if code and id_ not in asked and not (by_hand and code not in _CODES):
                what, why = _CODES.get(code, (f"it ended with code {code}", "its last log lines say why"))
                yield Finding(at, service, what, why, f"`make logs S={service}`; {_more_memory(service)}")
        elif action == "start":
            asked.pop(id_, None)


def _restarts(evidence: Evidence) -> Iterable[Finding]:
    """Containers that the engine started again. It counts from anew where a person starts one."""
    explained = {one.where for one in _ends(evidence)}
    for service, found in evidence.inspected.items():
        state = found["State"]
        at = _moment(state.get("StartedAt", ""))
        restarts = int(found.get("RestartCount", 0)) if at >= evidence.since else 0
        limit = "; its memory limit was reached" if state.get("OOMKilled") else ""
        if restarts >= RESTARTS:
            yield Finding(
                at,
                service,
                f"a restart loop: the engine started it again {restarts} times",
                f"it ends soon after each start{limit}",
                f"`make logs S={service}` shows its last words before each end",
            )
        elif state.get("OOMKilled") and not state.get("Running"):
            yield Finding(
                _moment(state.get("FinishedAt", "")),
                service,
                "the container ended because its memory limit was reached",
                "the engine's own record says so (OOMKilled)",
                _more_memory(service),
            )
        elif restarts and service not in explained:
            yield Finding(
                at,
                service,
                f"it ended, and the engine started it again; restarts in all: {restarts}",
                f"the engine's own record says so (RestartCount); no event that it still has tells of a failure{limit}",
                f"`make logs S={service}` shows its last words before that",
            )


_CELERY = (
    (
        re.compile(r"raised error: WorkerLostError"),
        "WorkerLostError: a pool process ended while it supervised a task",
        "something killed that process from outside: the kernel for want of memory, or an operator. "
        "Its task ended with it and is retried if its DAG says so",
        f"look for a memory kill at the same time in this list; {MEMORY_DOC}",
    ),
    (
        re.compile(r"Could not start worker processes"),
        "'Could not start worker processes': a pool process ended before the worker's first loop",
        "too little memory for the pool, or too many processes on this host",
        "`make plan`; fewer slots (STACK_CPUS) or more memory (WORKER_MEMORY) in stack.env, then make up",
    ),
    (
        re.compile(r"the guard ended with code"),
        "the memory guard ended and was started again",
        "it was killed from outside, or met an error; its traceback stands above this line",
        "`make logs S=airflow-worker`",
    ),
)
_FULL = re.compile(r"No space left on device|disk full|XMinioStorageFull", re.IGNORECASE)


def _celery(evidence: Evidence) -> Iterable[Finding]:
    for service, lines in evidence.logs.items():
        for line in lines:
            at, _, text = line.partition(" ")
            if service == "airflow-worker":
                for pattern, what, why, fix in _CELERY:
                    if pattern.search(text):
                        yield Finding(_moment(at), service, what, why, fix)
            if _FULL.search(text):
                yield Finding(
                    _moment(at),
                    service,
                    "the disk was full",
                    "its log says: no space left on device",
                    "free space on the engine's disk (`docker system df`), then `make up`",
                )


def _killed_tasks(evidence: Evidence) -> Iterable[Finding]:
    for at, name in evidence.killed_tasks:
        yield Finding(
            at,
            f"task {name}",
            "a signal ended it, and not through the memory guard",
            "its log says so; it has no explanation of ours",
            "look for a memory kill or a lost worker at the same time in this list; else someone killed it",
        )


def _health(evidence: Evidence) -> Iterable[Finding]:
    for service, found in evidence.inspected.items():
        health = found["State"].get("Health") or {}
        if found["State"].get("Running") and health.get("Status") == "unhealthy":
            last = (health.get("Log") or [{}])[-1]
            yield Finding(
                _moment(last.get("End", "")),
                service,
                "it runs, but is not healthy",
                f"its probe says: {str(last.get('Output', '')).strip()[-300:]}",
                f"`make logs S={service}`, then `make restart`",
            )
    for event in evidence.events:
        if event.get("Action") == "health_status: unhealthy":
            service = str(event["Actor"]["Attributes"].get("com.docker.compose.service", ""))
            yield Finding(
                event.get("timeNano", 0) / 1e9,
                service,
                "it was unhealthy for a while",
                "three probes in a row failed; the engine noted it",
                f"`make logs S={service}`",
            )


def _disk(evidence: Evidence) -> Iterable[Finding]:
    for path, left in evidence.disk.items():
        if left < DISK_LEFT_MIB:
            yield Finding(
                time.time(),
                "host",
                f"{path} has {left} MiB left",
                "databases stop writing when the disk is full",
                "`docker image prune`, `docker builder prune`, or a larger disk",
            )


def _moment(text: str) -> float:
    """Seconds since 1970 of the engine's times; 0 where there is none."""
    try:
        # More digits than Python reads.
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


# --- reading


def gather(stack: Compose, airflow: Airflow | StackError, since: float) -> Evidence:
    """Reads every record of the stack since a moment; in Airflow's place stands why it cannot be asked."""
    evidence = Evidence(since)
    found = stack.containers()
    evidence.names = {one.id: one.service for one in found}
    for one in found:
        evidence.inspected[one.service] = json.loads(capture(["docker", "inspect", one.id], timeout=30).out)[0]
        told = capture(
            ["docker", "logs", "--timestamps", "--since", str(int(since)), "--tail", str(LOG_LINES), one.id],
            timeout=60,
            check=False,
        )
        _note_failure(evidence, f"the log of {one.service}", told)
        evidence.logs[one.service] = (told.out + told.err).splitlines()
    # All that the engine still has, other projects' too: the oldest one tells since when it has any.
    span = ["--since", "1", "--until", str(int(time.time()) + 1)]
    events = capture(["docker", "events", *span, "--format", "{{json .}}"], timeout=60, check=False)
    _note_failure(evidence, "the engine's events", events)
    _keep_events(evidence, stack.project, [json.loads(row) for row in events.out.splitlines() if row.startswith("{")])
    evidence.kernel = _kernel(evidence)
    root = capture(["docker", "info", "--format", "{{.DockerRootDir}}"], timeout=30, check=False).out.strip()
    if root and os.access(root, os.F_OK):
        evidence.disk[root] = shutil.disk_usage(root).free // 2**20
    try:
        evidence.overruns = observed.read(stack, since).overruns
    except StackError as error:
        evidence.unread.append(f"the tasks' record: {error.what}")
    if isinstance(airflow, StackError):
        evidence.unread.append(f"Airflow's records: {airflow.what}")
    else:
        try:
            evidence.killed_tasks = _killed(airflow, since)
        except StackError as error:
            evidence.unread.append(f"Airflow's records: {error.what}")
    return evidence


def _note_failure(evidence: Evidence, record: str, told: Result) -> None:
    """Says that a record is not whole, where the command that reads it failed or ran out of time."""
    if told.code != 0:
        last = (told.err.strip().splitlines() or ["no reason given"])[-1]
        evidence.unread.append(f"{record}, or not all of it: {last[:300]} (code {told.code})")


def _keep_events(evidence: Evidence, project: str, events: list[dict[str, Any]]) -> None:
    """Keeps a project's events of the time in question, and says where the engine has none of its beginning."""
    times = [event.get("timeNano", 0) / 1e9 for event in events]
    if times and min(times) > evidence.since:
        oldest = datetime.fromtimestamp(min(times)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        evidence.unread.append(
            f"the engine's events before {oldest}: it keeps the last {EVENTS}, and none from before its own start"
        )
    evidence.events = [
        event
        for at, event in zip(times, events, strict=True)
        if at >= evidence.since
        and event.get("Actor", {}).get("Attributes", {}).get("com.docker.compose.project") == project
    ]


def _kernel(evidence: Evidence) -> list[tuple[float, str]]:
    told = capture(["dmesg"], timeout=30, check=False)
    if told.code != 0:
        evidence.unread.append("the kernel's log: only root may read it here (sudo dmesg)")
        return []
    boot = time.time() - float(Path("/proc/uptime").read_text().split()[0])
    lines = (re.match(r"\[\s*(\d+\.\d+)\] (.*)", line) for line in told.out.splitlines())
    timed = [(boot + float(match[1]), match[2]) for match in lines if match]
    return [(at, text) for at, text in timed if at >= evidence.since and "oom-kill:" in text]


def _killed(airflow: Airflow, since: float) -> list[tuple[float, str]]:
    begin = datetime.fromtimestamp(since, tz=timezone.utc).isoformat()
    words = {
        "state": ["failed", "up_for_retry"],
        "start_date_gte": begin,
        "limit": FAILED_TASKS,
        "order_by": "-end_date",
    }
    found = []
    for one in airflow.call("GET", "/dags/~/dagRuns/~/taskInstances", params=words)["task_instances"]:
        try:
            log = airflow.task_log(
                one["dag_id"],
                one["dag_run_id"],
                one["task_id"],
                map_index=one["map_index"],
                attempt=max(1, one["try_number"]),
            )
        except StackError:
            continue
        if "Process terminated by signal" in log and "Out of memory: this task" not in log:
            found.append((_moment(one["end_date"] or one["start_date"]), f"{one['dag_id']}.{one['task_id']}"))
    return found
