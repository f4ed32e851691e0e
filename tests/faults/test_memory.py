"""A hungry task fails alone, with a reason. Each case misuses memory in its own way (memory_dags.py),
on a worker of 1 GiB (WORKER_MEMORY=2g and the like for another size); after each of them the worker must
be the same one, untouched by the kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import scripts.storm as storm
from bench.systems import usage
from stack.airflow import Airflow
from tests.support import StackUnderTest, dag_file, wait_until

WORKER = "airflow-worker"
OUT_OF_MEMORY = "Out of memory: "


@dataclass(frozen=True)
class Outcome:
    """How a DAG of one task ended."""

    state: str
    tries: int
    logs: list[str]
    """Of each attempt."""

    @property
    def explanation(self) -> str:
        """What the last log says about memory, near its end: Airflow adds its own line to a kill, and a
        child that was killed may leave its last words."""
        told = [line for line in self.logs[-1].splitlines() if line.startswith(OUT_OF_MEMORY)]
        assert len(told) == 1, self.logs[-1][-3000:]
        return told[0]


@pytest.fixture(scope="module")
def play(stack: StackUnderTest, airflow: Airflow) -> Iterator[Callable[..., Outcome]]:
    """Runs one case to its end."""

    def run(case: str, patience: float = 120, conf: dict[str, Any] | None = None, sent: bool = True) -> Outcome:
        """`sent` is false where a supervisor is lost: the log it cannot send stays with the worker."""
        dag_id = f"fault_{case}"
        airflow.wait_for_dag(dag_id)
        airflow.set_paused(dag_id, False)
        run_id = airflow.trigger(dag_id, conf)
        state = airflow.follow(dag_id, run_id, patience=patience)
        last = airflow.task_instances(dag_id, run_id)[-1]
        words = {"map_index": last["map_index"]}
        tries = range(1, last["try_number"] + 1)

        def stored(attempt: int) -> str:
            # The run is over moments before the pool process has written the last words of a log and sent
            # it to the store.
            log = airflow.task_log(dag_id, run_id, last["task_id"], attempt=attempt, **words)
            return log if not sent or "s3://" in log.partition("::endgroup::")[0] else ""

        logs = [
            wait_until(partial(stored, number), 60, f"the whole log of attempt {number} of {dag_id}")
            for number in tries
        ]
        return Outcome(state, last["try_number"], logs)

    with dag_file(stack, "tests/faults/memory_dags.py"):
        yield run


@pytest.fixture
def unharmed(stack: StackUnderTest) -> Iterator[None]:
    """The worker is the same one afterwards, the kernel killed nothing in it, and no process is left over."""
    before = storm.worker_now(stack.compose)
    yield
    assert storm.worker_now(stack.compose) == before
    wait_until(lambda: task_processes(stack) == [], 15, "no task process is left in the worker")


def task_processes(stack: StackUnderTest) -> list[str]:
    """Command lines in the worker that are neither Celery's nor the guard's."""
    told = stack.exec(
        WORKER,
        "python3",
        "-c",
        "from taskguard import linux\n"
        "for one in linux.processes().values():\n"
        "    text = linux.command(one.pid)\n"
        "    if one.parent != 0 and not one.zombie: print(one.pid, one.name, text)",
    )
    assert told.code == 0, told.output
    own = ("celeryd", "airflow supervisor", "taskguard.guard", "worker-probe", "linux.processes")
    return [line for line in told.output.splitlines() if not any(word in line for word in own)]


def guards(stack: StackUnderTest) -> str:
    """The guard's process id; empty while there is none."""
    find = (
        "from taskguard import linux\n"
        "print(*[p for p in linux.processes() if linux.command(p).endswith('-m taskguard.guard')])"
    )
    return stack.exec(WORKER, "python3", "-c", find).output.strip()


# First: it brings the DAG file itself, and takes it away again.
def test_a_short_storm(stack: StackUnderTest) -> None:
    """`make storm`, one round, with sleepers of five seconds. The full one has 20 rounds of forty."""
    told = stack.make("storm", "ARGS=--rounds 1 --seconds 5", timeout=600)
    assert told.code == 0, told.output
    assert "1 of 1 rounds good" in told.output


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("grow", "MemoryError"),
        ("threads", "MemoryError"),
        ("allocation", "Unable to allocate 10.0 GiB"),
        ("bash", "Bash command failed"),
        ("futures", "BrokenProcessPool"),
        ("joblib", "Error"),
        ("fork_pool", ""),
        ("sits", ""),
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_an_overrun_ends_that_task_with_a_reason(play: Callable[..., Outcome], case: str, seen: str) -> None:
    """Python itself, threads, a program, three kinds of process pools; one that asks for nothing more."""
    ended = play(case)
    assert ended.state == "failed"
    assert seen in ended.logs[0]
    for part in ("Budget ", "peak ", "largest process", "free for tasks", "resources=", "stack.env"):
        assert part in ended.explanation


@pytest.mark.usefixtures("unharmed")
def test_callbacks_have_time_and_memory(play: Callable[..., Outcome]) -> None:
    """They run before Airflow tells anybody of the failure."""
    ended = play("callback")
    assert ended.state == "failed"
    assert "the callback had 32 MiB" in ended.logs[0]
    assert ended.explanation


@pytest.mark.parametrize(
    ("case", "told"),
    [("fork_bomb", "processes"), ("line_of_program", "the process that supervises it grew")],
)
@pytest.mark.usefixtures("unharmed")
def test_other_ways_to_take_the_worker_down(play: Callable[..., Outcome], case: str, told: str) -> None:
    """A fork bomb; 500 MB without a line's end, written past Python."""
    ended = play(case)
    assert ended.state == "failed"
    assert told in ended.explanation


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("idle_threads", "Returned value was: 16"),
        ("shared", "Returned value was"),
        ("pool_left", "Returned value was: left"),
        ("catches", "Returned value was: recovered"),
        ("daemon", "Done"),
        ("prints", "from a program"),
        ("line", "cut here"),
        ("record", "cut here"),
        ("lines", "more is not kept"),
        ("letters", "more is not kept"),
        ("rows", "more is not kept"),
        ("twice", "MiB (from its resources)"),
    ],
)
@pytest.mark.usefixtures("unharmed")
def test_what_is_within_the_budget_succeeds(play: Callable[..., Outcome], case: str, seen: str) -> None:
    """Reserved but unused memory, memory shared by forks, a pool left early, a caught MemoryError,
    endless lines of Python's; and a task that asks for twice the default gets it."""
    ended = play(case)
    assert ended.state == "success", ended.logs
    assert seen in ended.logs[-1]


def test_the_longest_log_is_shown_a_piece_at_a_time(
    stack: StackUnderTest, play: Callable[..., Outcome], airflow: Airflow
) -> None:
    """Whoever looks at it, the API server keeps its memory: read whole it took a hundred MiB for each reader."""
    play("lines")
    (run, *_) = airflow.runs("fault_lines")
    before = most = own_memory(stack, "airflow-apiserver")
    with ThreadPoolExecutor(1) as pool:
        reads = pool.submit(lambda: [airflow.task_log("fault_lines", run["dag_run_id"], "it") for _ in range(3)])
        while not reads.done():
            most = max(most, own_memory(stack, "airflow-apiserver"))
    assert all(len(log) > 3 * 2**20 for log in reads.result())
    assert most - before < 24 * 2**20


@pytest.mark.usefixtures("unharmed")
def test_large_results_are_refused_where_they_are_made(play: Callable[..., Outcome]) -> None:
    """An XCom passes through the worker, the API server and the database."""
    ended = play("xcom_parts")
    assert ended.state == "failed"
    assert "XComTooLargeError: this XCom has 40.0 MiB" in ended.logs[-1]
    assert play("xcom").state == "failed"


@pytest.mark.usefixtures("unharmed")
def test_a_retry_gets_more(play: Callable[..., Outcome]) -> None:
    """The log says so, and the second attempt ends well."""
    ended = play("grow_retry")
    assert (ended.state, ended.tries) == ("success", 2)
    assert OUT_OF_MEMORY in ended.logs[0]
    assert "were too little before; this time the budget is" in ended.logs[1]


@pytest.mark.usefixtures("unharmed")
def test_more_than_the_worker_has_fails_at_once(play: Callable[..., Outcome]) -> None:
    """Though it has retries: they would not help."""
    ended = play("too_large")
    assert (ended.state, ended.tries) == ("failed", 1)
    assert "asks for 1000000 MiB" in ended.logs[-1]
    assert "can give at most" in ended.logs[-1]


@pytest.mark.usefixtures("unharmed")
def test_a_large_task_waits_and_gets_in(play: Callable[..., Outcome], airflow: Airflow) -> None:
    """Six small ones and one that needs nearly the whole worker: it waits, visibly, and all succeed."""
    ended = play("queue")
    assert ended.state == "success"
    (run,) = airflow.call("GET", "/dags/fault_queue/dagRuns", params={"order_by": "-start_date", "limit": 1})[
        "dag_runs"
    ]
    logs = [
        airflow.task_log("fault_queue", run["dag_run_id"], one["task_id"], map_index=one["map_index"])
        for one in airflow.task_instances("fault_queue", run["dag_run_id"])
    ]
    assert any("Waiting for memory: this task needs" in log for log in logs)


@pytest.mark.usefixtures("unharmed")
def test_the_guard_keeps_nothing_open(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """It lives as long as the worker: a descriptor left open by each task would end it one day."""
    count = (
        "import os\nfrom taskguard import linux\n"
        "(pid,) = [p for p in linux.processes() if linux.command(p).endswith('-m taskguard.guard')]\n"
        "print(len(os.listdir(f'/proc/{pid}/fd')))"
    )
    before = int(stack.exec(WORKER, "python3", "-c", count).output)
    assert play("many", conf={"tasks": 20}).state == "success"
    wait_until(
        lambda: int(stack.exec(WORKER, "python3", "-c", count).output) <= before, 15, f"at most {before} open files"
    )


@pytest.mark.usefixtures("unharmed")
def test_the_guard_comes_back(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """Killed, it is started again, and the next hungry task is ended as before."""
    first = guards(stack)
    killed = stack.exec(WORKER, "bash", "-c", f"kill -9 {first}")
    assert killed.code == 0, killed.output
    wait_until(lambda: guards(stack) not in (first, ""), 30, "a new guard")
    assert OUT_OF_MEMORY in play("grow").logs[0]


@pytest.mark.usefixtures("unharmed")
def test_a_task_that_began_without_a_guard(stack: StackUnderTest, airflow: Airflow) -> None:
    """The guard ends while a task reads its DAG file: the next one lets it in by what it asks, and lives on."""
    with dag_file(stack, "tests/faults/slow_dag.py"):
        airflow.wait_for_dag("fault_slow")
        airflow.set_paused("fault_slow", False)
        run_id = airflow.trigger("fault_slow")
        wait_until(lambda: task_processes(stack), 60, "it reads its file")
        first = guards(stack)
        killed = stack.exec(WORKER, "bash", "-c", f"kill -9 {first}")
        assert killed.code == 0, killed.output
        second = wait_until(lambda: guards(stack) not in (first, "") and guards(stack), 30, "a new guard")
        assert airflow.follow("fault_slow", run_id, patience=120) == "success"
        assert "Memory budget: " in airflow.task_log("fault_slow", run_id, "it")
        assert guards(stack) == second


def test_a_lost_pool_process_costs_one_attempt(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """Its task ends with it, at once, and is retried; the worker stays. `make doctor` explains it."""
    before = storm.worker_now(stack.compose)
    ended = play("kill_pool_process", patience=240, sent=False)
    assert ended.tries == 2
    assert "kills process" in ended.logs[0]
    wait_until(lambda: task_processes(stack) == [], 15, "no task process is left in the worker")
    assert storm.worker_now(stack.compose) == before
    told = stack.make("doctor")
    assert "WorkerLostError: a pool process ended while it supervised a task" in told.output
    assert "task fault_grow.it: this task was ended because it took more memory than its budget" in told.output


def test_what_was_learned(stack: StackUnderTest) -> None:
    """`make memory` has the peak of each task, what to write into its DAG, and how many slots would fit."""
    told = stack.make("memory")
    assert told.code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if "fault_bash.it" in line]
    assert "resources={" in line
    assert "slots of that size" in told.output
    planned = stack.make("plan", "FROM=observed")
    assert "+TASK_MEMORY=" in planned.output
    assert "E-CONFIRM" in planned.output
    assert "TASK_MEMORY" not in Path(stack.instance.settings_file).read_text()


def test_the_kernels_kill_is_told(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """A task that got past the guard and filled the container: the kernel takes that task, nothing of
    Celery's, and its log and `make doctor` say so."""
    before, since = storm.worker_now(stack.compose), time.time()
    ended = play("escapes")
    after = storm.worker_now(stack.compose)
    assert ended.state == "failed"
    assert "the kernel" in ended.explanation
    assert after.oom_kills > before.oom_kills
    assert (after.started, after.restarts) == (before.started, before.restarts)
    assert storm.lost(stack.compose, since) == 0
    assert "the kernel" in stack.make("doctor").output
    wait_until(lambda: task_processes(stack) == [], 15, "no task process is left in the worker")


LEAVES = "it gives its slot back, keeps its place, and comes again"
WAITS = "Waiting for memory: this task needs"


@pytest.mark.long
@pytest.mark.usefixtures("unharmed")
def test_the_first_of_the_queue_stays(play: Callable[..., Outcome], airflow: Airflow) -> None:
    """However long it takes, or small ones would get in instead for ever; its log says again why."""
    assert play("large_first", patience=400).state == "success"
    run_id = airflow.runs("fault_large_first")[0]["dag_run_id"]
    log = airflow.task_log("fault_large_first", run_id, "waits", map_index=0)
    assert log.count(WAITS) > 1
    assert LEAVES not in log


@pytest.mark.usefixtures("unharmed")
def test_who_waits_too_long_keeps_its_place(
    stack: StackUnderTest, play: Callable[..., Outcome], airflow: Airflow
) -> None:
    """After 100 s a task that waits behind another gives its slot back, before Airflow or Celery would take it
    away, comes back, and gets in without having used up an attempt. The first stays, and so does one that was
    deferred: it would begin anew, without its event."""
    if int(stack.compose.values["WORKER_CONCURRENCY"]) < 4:
        pytest.skip("takes four slots: WORKER_MEMORY=2g, or --running")
    dag_id = "fault_come_back"
    ended = play("come_back", patience=400)
    run_id = airflow.runs(dag_id)[0]["dag_run_id"]
    found = airflow.task_instances(dag_id, run_id)

    def log(task_id: str, map_index: int = -1) -> str:
        return airflow.task_log(dag_id, run_id, task_id, map_index=map_index)

    failed = {one["task_id"]: log(one["task_id"], one["map_index"]) for one in found if one["state"] == "failed"}
    assert ended.state == "success", failed
    assert {one["try_number"] for one in found} == {1}

    waited = [log("waits", number) for number in (0, 1)]
    assert all(WAITS in one for one in waited)
    assert sorted(LEAVES in one for one in waited) == [False, True]
    deferred = log("deferred")
    assert WAITS in deferred.partition("first half")[2]
    assert LEAVES not in deferred
    assert deferred.count("this is the first half") == 1
    assert "woken with" in airflow.xcom(dag_id, run_id, "deferred")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["stops_its_supervisor", "loses_its_supervisor"])
def test_a_pool_process_that_hangs_is_replaced(stack: StackUnderTest, play: Callable[..., Outcome], fault: str) -> None:
    """Stopped while its task ends, or goes on: Airflow retries the task after the heartbeat timeout, and the
    guard ends the pool process after five minutes, which frees its slot."""
    before = storm.worker_now(stack.compose)
    since = time.time()
    ended = play(fault, patience=900, sent=False)
    # The second attempt stops its supervisor as well.
    assert ended.tries == 2
    wait_until(lambda: storm.lost(stack.compose, since) == 2, 900, "both pool processes replaced")
    assert storm.worker_now(stack.compose) == before
    wait_until(lambda: task_processes(stack) == [], 15, "no task process is left in the worker")
    assert play("catches").state == "success"


@pytest.mark.long
def test_a_lost_worker_comes_back(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """Celery's main process killed: the container restarts, and its task is retried after the heartbeat
    timeout of three minutes."""
    ended = play("kill_main", patience=600, sent=False)
    assert ended.tries == 2
    wait_until(lambda: stack.inspect(WORKER)["State"]["Health"]["Status"] == "healthy", 120, "a healthy worker")


@pytest.mark.long
def test_who_stands_behind_long_tasks_gets_a_turn(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """In the queue for longer than three times task_queued_timeout: it is not failed, and was tried once."""
    slots = int(stack.compose.values["WORKER_CONCURRENCY"])
    ended = play("behind", patience=1500, conf={"tasks": slots + 1})
    assert (ended.state, ended.tries) == ("success", 1)


@pytest.mark.long
@pytest.mark.usefixtures("unharmed")
def test_leaks_end_with_their_task(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """200 tasks that each keep 16 MiB in a module: the worker's own memory stays what it was. Warmed up
    first: the pool processes of a worker that has just started have not grown to their size."""
    assert play("many", conf={"tasks": 20}).state == "success"
    idle = own_memory(stack)
    assert play("leak", patience=900).state == "success"
    assert own_memory(stack) < idle * 1.1


@pytest.mark.long
@pytest.mark.usefixtures("unharmed")
def test_ten_thousand_small_tasks_leave_nothing_behind(stack: StackUnderTest, play: Callable[..., Outcome]) -> None:
    """The worker's idle memory afterwards is within a tenth of before. Warmed up by 100 tasks first."""
    assert play("many", patience=300, conf={"tasks": 100}).state == "success"
    idle = own_memory(stack)
    for _ in range(10):
        assert play("many", patience=1800, conf={"tasks": 1000}).state == "success"
    assert own_memory(stack) < idle * 1.1


def own_memory(stack: StackUnderTest, service: str = WORKER) -> int:
    """Bytes of a service's processes: without page cache, and without the names of the log files that the kernel
    remembers until it needs the memory (about 2.5 KiB a task)."""
    return usage(stack.compose.project).by_service[service][1]
