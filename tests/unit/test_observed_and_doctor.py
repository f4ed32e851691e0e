"""What follows from records: figures for the plan, and findings with a reason and a way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import plan as plan_program
from stack import doctor, observed, plan, settings
from stack.doctor import Evidence
from stack.errors import StackError
from stack.observed import Overrun, Task
from stack.process import Result
from tests.support import hidden_folder

ID = "c0ffee" * 10


def seen(peak: int, runs: int = 1, **words: Any) -> Task:
    made = {"dag_id": "d", "task_id": "t", "last": peak, "budget": 192, "declared": None, "overruns": 0}
    return Task(peak=peak, runs=runs, **(made | words))


@pytest.mark.parametrize(
    ("task", "advice"),
    [
        (seen(100), ""),
        (seen(192), 'resources={"ram": 256}'),
        (seen(300, declared=416), ""),
        (seen(300, declared=320), 'resources={"ram": 384}'),
        (seen(100, declared=1000), 'resources={"ram": 128} (it has asked for more than twice that)'),
        (seen(5, overruns=1), 'resources={"ram": 384} (it asked for more than its budget at once)'),
    ],
)
def test_advice(task: Task, advice: str) -> None:
    assert task.advice(192) == advice


def test_the_rare_large_task_does_not_make_the_plan() -> None:
    """The default does for 95 % of all runs; the others declare their own figure."""
    assert observed.typical([seen(60, runs=97), seen(2000, runs=3)]) == 96
    assert observed.typical([seen(60, runs=90), seen(2000, runs=10)]) == 2528
    assert observed.typical([]) is None


@pytest.mark.parametrize(
    "before", ["", "#TASK_MEMORY=\n", "TASK_MEMORY=1g\n", "AIRFLOW_PORT=8081\n", "#TASK_MEMORY=\nTASK_MEMORY=1g\n"]
)
def test_a_setting_is_written_where_it_belongs(before: str) -> None:
    after = plan_program.with_setting(before, "TASK_MEMORY", "96m")
    assert settings.parse(after).task_memory == 96 * 2**20
    assert re.findall(r"^TASK_MEMORY", after, re.MULTILINE) == ["TASK_MEMORY"]
    assert ("AIRFLOW_PORT=8081" in before) == ("AIRFLOW_PORT=8081" in after)


def test_the_operators_own_figures_rule_the_plan() -> None:
    sizing = plan.load_sizing()
    made = plan.make_plan(sizing, 8192, 2, worker=1024, task=100)
    assert made.limits["worker"].limit == 1024
    assert made.task_budget == 100
    assert made.total <= made.budget
    assert made.worker_slots * (100 + sizing.worker.slot) + sizing.worker.base <= 1024


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ({"worker": 500}, "E-MEM-WORKER"),
        ({"worker": 8000}, "E-MEM-WORKER"),
        ({"task": 20}, "E-MEM-TASK"),
        ({"worker": 1024, "task": 900}, "E-MEM-TASK"),
    ],
)
def test_figures_that_do_not_fit_are_refused(words: dict[str, int], code: str) -> None:
    with pytest.raises(plan.StackError) as error:
        plan.make_plan(plan.load_sizing(), 8192, 2, **words)
    assert error.value.code == code
    assert "MiB here" in error.value.what


def inspected(**state: Any) -> dict[str, Any]:
    return {"RestartCount": 0, "State": {"Running": True, "StartedAt": "2026-11-23T10:00:00.123456789Z"} | state}


def event(action: str, at: float = 100, **attributes: str) -> dict[str, Any]:
    attributes["com.docker.compose.service"] = "airflow-worker"
    return {"Action": action, "timeNano": at * 1e9, "Actor": {"ID": ID, "Attributes": attributes}}


KILL = (
    "oom-kill:constraint={},nodemask=(null),cpuset=x,mems_allowed=0,oom_memcg=/docker/{id},"
    "task_memcg=/docker/{id},task=python3,pid=4242,uid=50000"
)
LINE = "2026-11-23T10:00:00.5Z 2026-11-23 [error] Task handler "
CASES = {
    "a task beyond its budget": (
        Evidence(
            0,
            overruns=[
                Overrun(
                    dag_id="d",
                    task_id="t",
                    map_index=-1,
                    try_number=1,
                    at=5,
                    told="Out of memory: this task was ended because X. Budget 192 MiB. To give this task more",
                )
            ],
        ),
        "this task was ended because X",
    ),
    "a kernel kill in our container": (
        Evidence(0, names={ID: "mlflow"}, kernel=[(5, KILL.format("CONSTRAINT_MEMCG", id=ID))]),
        "the kernel ended a process (python3) for want of memory",
    ),
    "a kernel kill on a full host": (
        Evidence(0, names={ID: "mlflow"}, kernel=[(5, KILL.format("CONSTRAINT_NONE", id=ID))]),
        "because the whole host ran out of memory",
    ),
    "exit 137": (Evidence(0, events=[event("die", exitCode="137")]), "it was killed (137)"),
    "an OOM event": (Evidence(0, events=[event("oom")]), "the container reached its memory limit"),
    "a restart loop": (
        Evidence(0, inspected={"mlflow": inspected() | {"RestartCount": 7}}),
        "a restart loop: the engine started it again 7 times",
    ),
    "one restart, of which no event is left": (
        Evidence(0, events=[event("start")], inspected={"airflow-worker": inspected() | {"RestartCount": 1}}),
        "the engine started it again; restarts in all: 1",
    ),
    "one restart with its event": (
        Evidence(
            0,
            events=[event("die", exitCode="137")],
            inspected={"airflow-worker": inspected() | {"RestartCount": 1}},
        ),
        "it was killed (137)",
    ),
    "WorkerLostError": (
        Evidence(0, logs={"airflow-worker": [LINE + "raised error: WorkerLostError('signal 9')"]}),
        "WorkerLostError: a pool process ended",
    ),
    "the pool did not start": (
        Evidence(0, logs={"airflow-worker": [LINE + "WorkerLostError('Could not start worker processes')"]}),
        "'Could not start worker processes'",
    ),
    "a full disk in a log": (
        Evidence(0, logs={"postgres": [LINE + "could not extend file: No space left on device"]}),
        "the disk was full",
    ),
    "a disk that is nearly full": (Evidence(0, disk={"/var/lib/docker": 12}), "/var/lib/docker has 12 MiB left"),
    "unhealthy now": (
        Evidence(
            0,
            inspected={
                "mlflow": inspected(Health={"Status": "unhealthy", "Log": [{"End": "", "Output": "no answer"}]})
            },
        ),
        "it runs, but is not healthy",
    ),
    "unhealthy before": (Evidence(0, events=[event("health_status: unhealthy")]), "it was unhealthy for a while"),
    "a task that a signal ended": (Evidence(0, killed_tasks=[(5, "d.t")]), "a signal ended it"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_record_is_explained(name: str) -> None:
    """One finding, with what, why and a way out."""
    evidence, what = CASES[name]
    (found,) = doctor.diagnose(evidence)
    assert what in found.what
    assert found.why
    assert found.fix


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(0),
        Evidence(0, events=[event("kill"), event("die", exitCode="137")]),
        Evidence(0, events=[event("die", exitCode="0")]),
        Evidence(0, events=[event("die", exitCode="1", **{"com.docker.compose.oneoff": "True"})]),
        Evidence(0, inspected={"mlflow": inspected(Health={"Status": "healthy"})}),
        Evidence(2e9, inspected={"mlflow": inspected() | {"RestartCount": 2}}),
        Evidence(0, names={ID: "mlflow"}, kernel=[(5, KILL.format("CONSTRAINT_MEMCG", id="another"))]),
        Evidence(0, disk={"/": 10**6}),
        Evidence(0, logs={"mlflow": ["2026-11-23T10:00:00Z all is well"]}),
    ],
)
def test_nothing_is_found_where_nothing_is_wrong(evidence: Evidence) -> None:
    """Among it: a container that `make down` had to kill, `make dag-lint` that found something, restarts before the
    time in question, and another stack's kernel kill."""
    assert doctor.diagnose(evidence) == []


def test_the_same_again_is_told_once() -> None:
    evidence = Evidence(0, names={ID: "mlflow"}, kernel=[(n, KILL.format("CONSTRAINT_MEMCG", id=ID)) for n in (1, 2)])
    (found,) = doctor.diagnose(evidence)
    assert (found.count, found.at) == (2, 2)


def test_an_engine_whose_disk_may_not_be_looked_at_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user in the docker group sees its root directory by name only."""
    stack: Any = SimpleNamespace(project="x", containers=list)
    monkeypatch.setattr(observed, "read", lambda *_: SimpleNamespace(overruns=[]))
    with hidden_folder(tmp_path) as hidden:
        answers = {("docker", "info"): str(hidden)}
        monkeypatch.setattr(doctor, "capture", lambda words, **_: Result(0, answers.get(tuple(words[:2]), ""), ""))
        assert doctor.gather(stack, StackError("E-X", "not asked", why="", fix=""), 0).disk == {}


def test_events_that_the_engine_has_no_more_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a finding, for it keeps a few minutes of a healthy stack. Those of other projects and times are not ours."""
    ours = {"com.docker.compose.project": "x"}
    events = [event("die", 150, exitCode="1", **ours), event("die", 160, exitCode="1"), event("start", 170, **ours)]
    stack: Any = SimpleNamespace(project="x", containers=list)
    monkeypatch.setattr(observed, "read", lambda *_: SimpleNamespace(overruns=[]))

    def gathered(since: float) -> Evidence:
        answers = {("docker", "events"): "\n".join(json.dumps(one) for one in events)}
        monkeypatch.setattr(doctor, "capture", lambda words, **_: Result(0, answers.get(tuple(words[:2]), ""), ""))
        return doctor.gather(stack, StackError("E-X", "not asked", why="", fix=""), since)

    early, late = gathered(100), gathered(155)
    assert [one["timeNano"] for one in early.events] == [150e9, 170e9]
    assert [one["timeNano"] for one in late.events] == [170e9]
    assert any("keeps the last 256" in missing for missing in early.unread)
    assert not any("events" in missing for missing in late.unread)
    assert doctor.diagnose(late) == []


@pytest.mark.parametrize(("code", "reason"), [(124, "no answer within 60 s"), (1, "Error response from daemon: oh")])
def test_records_that_could_not_be_read_are_said(monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    """Else `nothing found` would be told of what nobody has looked at."""
    stack: Any = SimpleNamespace(project="x", containers=lambda: [SimpleNamespace(id=ID, service="mlflow")])
    monkeypatch.setattr(observed, "read", lambda *_: SimpleNamespace(overruns=[]))
    failing = Result(code, "", f"{LINE}\n{reason}\n")
    answers = {"inspect": Result(0, json.dumps([inspected()]), ""), "logs": failing, "events": failing}
    empty = Result(0, "", "")
    monkeypatch.setattr(doctor, "capture", lambda words, **_: answers.get("".join(words[1:2]), empty))
    unread = doctor.gather(stack, StackError("E-X", "not asked", why="", fix=""), 0).unread
    for record in ("the log of mlflow", "the engine's events"):
        assert any(missing.startswith(record) and reason in missing for missing in unread), unread
