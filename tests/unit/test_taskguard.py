"""The guard's decisions, without a kernel and without Airflow: who is admitted, what is remembered,
what is told."""

from __future__ import annotations

import resource
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard import explain, linux, protocol
from taskguard.admission import Admission
from taskguard.explain import Figures
from taskguard.guard import ENDING_PATIENCE_S, LAST_WORDS, PATIENCE_S, Guard, Watch
from taskguard.ledger import MAX_OVERRUNS, Instance, Ledger
from taskguard.linux import MIB, Container, Memory

budgets = st.lists(st.integers(min_value=1, max_value=100), max_size=30)


def ran(number: int = 0, *, try_number: int = 1, task: str = "it") -> Instance:
    return Instance("dag", task, "run", number, try_number)


@given(budgets)
def test_what_is_granted_never_exceeds_the_capacity(wanted: list[int]) -> None:
    """Whatever is asked for, in whatever order others leave; and in the end everyone was in."""
    door: Admission[int] = Admission(100)
    for number, budget in enumerate(wanted):
        door.ask(number, budget, since=number)
    admitted: list[int] = []
    while door.waiting:
        admitted += door.admit()
        assert door.committed <= door.capacity
        assert door.granted, "with nobody inside, the first must fit"
        door.leave(next(iter(door.granted)))
    assert admitted == list(range(len(wanted)))


def test_small_ones_do_not_overtake_a_large_one() -> None:
    """A large task at the head waits for those inside only, not for those behind it."""
    door: Admission[str] = Admission(100)
    door.ask("small", 30, since=1)
    assert door.admit() == ["small"]
    door.ask("large", 80, since=2)
    door.ask("later", 30, since=3)
    assert door.admit() == []
    door.leave("small")
    assert door.admit() == ["large"]
    door.leave("large")
    assert door.admit() == ["later"]


def test_a_task_that_comes_back_keeps_its_place() -> None:
    door: Admission[str] = Admission(100)
    door.ask("inside", 90, since=0)
    door.admit()
    door.ask("newer", 50, since=5)
    door.ask("came back", 50, since=2)
    door.leave("inside")
    assert door.admit() == ["came back", "newer"]


def test_those_who_wait_do_not_block_each_other() -> None:
    """Two that wait hold memory already; the head would never fit. The last one has to go."""
    door: Admission[str] = Admission(100)
    door.ask("head", 90, since=1, held=20)
    door.ask("behind", 90, since=2, held=20)
    assert door.admit() == []
    assert door.in_the_way() == "behind"
    door.leave("behind")
    assert door.admit() == ["head"]


def test_nobody_has_to_go_while_the_head_waits_for_those_inside() -> None:
    door: Admission[str] = Admission(100)
    door.ask("inside", 50, since=0)
    door.admit()
    door.ask("head", 90, since=1)
    door.ask("behind", 20, since=2, held=20)
    assert door.in_the_way() is None


def test_whoever_asks_again_does_not_wait_for_itself() -> None:
    """The grant did not reach it."""
    door: Admission[str] = Admission(100)
    door.ask("it", 80, since=1)
    assert door.admit() == ["it"]
    door.ask("it", 80, since=2)
    assert door.admit() == ["it"]
    assert door.committed == 80


def test_the_first_and_those_who_cannot_come_back_are_not_sent_away() -> None:
    door: Admission[str] = Admission(100)
    door.ask("inside", 90, since=0)
    door.admit()
    door.ask("head", 100, since=1, held=5)
    door.ask("resumed", 20, since=2, held=5, stays=True)
    door.ask("small", 5, since=3, held=5)
    assert door.behind() == ["small"]
    door.leave("small")
    assert door.in_the_way() is None
    assert door.admit() == []
    door.leave("inside")
    assert door.admit() == ["head"], "what those who stay hold is no reason to wait for ever"
    assert door.admit() == []
    door.leave("head")
    assert door.admit() == ["resumed"]


def test_the_ledger_outlives_its_process(tmp_path: Path) -> None:
    """Runs, the highest peak and the last figures; after closing and opening again."""
    ledger = Ledger(tmp_path / "ledger.db")
    for peak in (100, 300, 200):
        ledger.record(ran(), peak, 192, None, overrun=peak > 192)
    ledger.close()
    (row,) = Ledger(tmp_path / "ledger.db").tasks()
    assert (row["runs"], row["peak"], row["last"], row["budget"], row["overruns"]) == (3, 300, 200, 192, 2)


def test_a_retry_finds_what_was_too_little(tmp_path: Path) -> None:
    """Only of the same instance, and only of earlier attempts."""
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record_overrun(ran(1, try_number=1), 192, 200, "told")
    assert ledger.last_overrun(ran(1, try_number=2)) == 192
    assert ledger.last_overrun(ran(1, try_number=1)) is None
    assert ledger.last_overrun(ran(2, try_number=2)) is None


def test_the_ledger_stays_small(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for number in range(MAX_OVERRUNS + 20):
        ledger._file.execute(
            "INSERT INTO overrun VALUES ('d', 't', 'r', ?, 1, 1, 1, ?, '')",
            (number, number),
        )
    ledger.write(at_once=True)
    kept = [row["map_index"] for row in ledger.overruns()]
    assert len(kept) == MAX_OVERRUNS
    assert min(kept) == 20, "the oldest go first"


def test_a_damaged_ledger_is_put_aside(tmp_path: Path) -> None:
    """It holds figures, not data: the worker must start without it."""
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is no database" * 100)
    assert Ledger(path).tasks() == []
    assert (tmp_path / "ledger.db.damaged").exists()
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "ledger.db.damaged").execute("SELECT * FROM task")


def test_a_ledger_that_cannot_be_opened_is_left_alone(tmp_path: Path) -> None:
    """No room, or no access: that says nothing about the file. The guard counts on."""
    whole = tmp_path / "ledger.db"
    first = Ledger(whole)
    first.record(ran(), 100, 192, None, overrun=False)
    first.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        full = Ledger(whole)
        full.record(ran(), 200, 192, None, overrun=False)
        full.record_overrun(ran(), 192, 200, "told")
        assert full.last_overrun(ran(try_number=2)) in (None, 192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "ledger.db.damaged").exists()
    (row,) = Ledger(whole).tasks()
    assert row["peak"] == 100


def test_a_disk_that_fills_up_costs_figures_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        for number in range(3):
            ledger.record_overrun(ran(number), 192, 200, "told")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("not written down at the moment") == 1
    ledger.record_overrun(ran(7), 192, 200, "told")
    ledger.close()
    assert 7 in [row["map_index"] for row in Ledger(tmp_path / "ledger.db").overruns()]


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Guard, Watch]]:
    """A guard, and a task of 100 MiB that went beyond them and says that it failed."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(protocol, "listen", lambda: ours)
    monkeypatch.setattr(linux, "container", lambda: Container(1000 * MIB, 500 * MIB, 0))
    guard = Guard(capacity=400, default=100, larger_retries=True, ledger=tmp_path / "ledger.db")
    task = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
    assert task.stdin
    assert task.stdout
    task.stdin.write(b"\n")
    task.stdout.readline()  # It has all the memory that it will ever want.
    found = linux.process(task.pid)
    assert found
    # No process has the number of its supervisor.
    watch = Watch(2**30, Memory(0, 0, 0), time.monotonic(), 100, leader=task.pid, members={task.pid: found})
    guard.watches[watch.supervisor] = watch
    watch.used = 110 * MIB
    guard._judge(watch, time.monotonic())
    guard._explain(watch, memory_error=True)
    yield guard, watch
    task.kill()
    task.communicate()
    ours.close()
    theirs.close()


def refused_beyond(watch: Watch) -> int:
    """Bytes that a task's own process may still ask for."""
    assert watch.leader
    found = linux.memory(watch.leader)
    assert found
    return resource.prlimit(watch.leader, resource.RLIMIT_DATA)[0] - found.data


def test_a_task_that_failed_has_memory_for_its_callbacks(ending: tuple[Guard, Watch]) -> None:
    """Still at the next look; and no more after it asked again, or than the container has."""
    guard, watch = ending
    assert watch.leader
    assert refused_beyond(watch) == LAST_WORDS
    watch.used += 24 * MIB
    guard._explain(watch, memory_error=True)
    assert refused_beyond(watch) == LAST_WORDS - 24 * MIB
    guard._measure(watch)
    assert refused_beyond(watch) > LAST_WORDS, "it has freed all: its budget is there as well"


def test_the_memory_for_callbacks_is_what_the_container_has(
    ending: tuple[Guard, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have their budgets in full."""
    guard, watch = ending
    monkeypatch.setattr(linux, "container", lambda: Container(1000 * MIB, 940 * MIB, 0))
    guard._explain(watch, memory_error=True)
    assert refused_beyond(watch) == 12 * MIB


@pytest.mark.parametrize(
    ("used", "after_s", "ends"),
    [
        (120 * MIB, PATIENCE_S + 1, False),
        (120 * MIB, ENDING_PATIENCE_S + 1, True),
        (110 * MIB + LAST_WORDS + 1, PATIENCE_S + 1, True),
    ],
)
def test_callbacks_have_time_unless_they_are_hungry(
    ending: tuple[Guard, Watch], used: int, after_s: float, ends: bool
) -> None:
    guard, watch = ending
    watch.used = used
    guard._judge(watch, time.monotonic() + after_s)
    assert watch.killed == ends


def figures(**words: Any) -> Figures:
    made: dict[str, Any] = {
        "kind": "budget",
        "budget": 192,
        "source": "the plan's share of each task",
        "peak": 201,
        "process": "python3 (pid 7, 190 MiB)",
        "processes": 3,
        "at": "10:11:12 UTC",
        "after_s": 1.25,
        "free": 40,
        "capacity": 976,
        "next_budget": 384,
    }
    return Figures(**(made | words))


@pytest.mark.parametrize(
    "part",
    [
        "took more memory than its budget",
        "Budget 192 MiB (the plan's share of each task)",
        "peak 201 MiB at 10:11:12 UTC, 1.2 s after the start",
        "python3 (pid 7, 190 MiB) of 3 processes",
        "40 of 976 MiB",
        'resources={"ram": 416}',
        "TASK_MEMORY=416m in stack.env",
        "it gets 384 MiB",
        "docs/memory.md#when-a-task-needs-more",
    ],
)
def test_the_explanation_answers_every_question(part: str) -> None:
    """Budget, peak, which process, when, what was free, what to set and where; in one paragraph."""
    text = explain.paragraph(figures())
    assert part in text
    assert "\n" not in text


def test_the_explanation_suggests_what_there_is() -> None:
    """Twice as much is not there, but enough is."""
    assert 'resources={"ram": 976}' in explain.paragraph(figures(budget=600, peak=610))


def test_the_explanation_suggests_nothing_that_the_worker_cannot_give() -> None:
    text = explain.paragraph(figures(budget=900, peak=950, next_budget=None))
    assert "resources=" not in text
    assert "at most 976 MiB" in text
    assert "If it is retried" not in text


@pytest.mark.parametrize("kind", ["supervisor", "processes", "log"])
def test_more_memory_is_not_advised_where_it_would_not_help(kind: str) -> None:
    text = explain.paragraph(figures(kind=kind, detail="17"))
    assert "17" in text
    assert "resources=" not in text


def test_a_task_that_can_never_fit_is_told_both_figures() -> None:
    text = explain.never(2000, 976)
    assert "2000 MiB" in text
    assert "976 MiB" in text


def test_container_memory_in_either_layout(tmp_path: Path) -> None:
    """cgroup v1 and v2 say the same in different files; page cache that can go does not count."""
    new, old = tmp_path / "v2", tmp_path / "v1"
    new.mkdir()
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 1\ninactive_file 50\nactive_file 30\nslab_reclaimable 20\n",
        "memory.events": "oom 3\noom_kill 2\n",
    }.items():
        (new / name).write_text(text)
    (old / "memory").mkdir(parents=True)
    for name, text in {
        "memory.limit_in_bytes": "1000\n",
        "memory.usage_in_bytes": "700\n",
        "memory.stat": "inactive_file 1\ntotal_inactive_file 60\ntotal_active_file 40\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    }.items():
        (old / "memory" / name).write_text(text)
    assert linux.container(new) == linux.container(old) == linux.Container(1000, 600, 2)
    (new / "memory.max").write_text("max\n")
    assert linux.container(new).limit > 2**60
