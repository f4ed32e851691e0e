"""DAGs that misuse memory on purpose: airflow's worker must survive each of them.

Copied into a stack's DAG folder by tests/faults and `make storm`, and removed afterwards. One DAG a
case, named `fault_<case>`; sizes are MiB, and follow the worker's plan where they must.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
from airflow.sdk import BaseOperator, Param, dag, get_current_context, task
from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

MIB = 2**20
SECOND = timedelta(seconds=1)
BUDGET = int(os.environ.get("AIRFLOW__OPERATORS__DEFAULT_RAM", "300"))
"""Of a task that asks for nothing. Right in the worker, which is where it counts."""
CAPACITY = int(os.environ.get("TASKGUARD_CAPACITY", "600"))
"""Of all tasks together."""
SMALL = 64
"""Fits beside others in any worker."""


def touch(mib: int) -> bytearray:
    """Memory that is really used."""
    block = bytearray(mib * MIB)
    block[::4096] = b"x" * len(block[::4096])
    return block


def grow(to_mib: int = 6400, step_mib: int = 16, pause_s: float = 0.05) -> int:
    """Takes a little more, and a little more."""
    blocks = []
    while len(blocks) * step_mib < to_mib:
        blocks.append(touch(step_mib))
        time.sleep(pause_s)
    return len(blocks)


def hold(mib: int, seconds: float) -> None:
    """Takes memory at once, and keeps it."""
    block = touch(mib)
    time.sleep(seconds)
    assert block


class Never(RetryPolicy):
    """No retry. Airflow 3.3 loses `retries=0` of a mapped task and takes `default_task_retries` instead."""

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        return RetryDecision.fail("retries are off in this test")


@dag(
    dag_id="fault_storm", params={"sleepers": Param(12), "hungry": Param(4), "seconds": Param(40)}, max_active_tasks=64
)
def storm() -> None:
    @task
    def numbers(kind: str) -> list[int]:
        return list(range(get_current_context()["params"][kind]))

    @task(retries=0)
    def modest(number: int) -> int:
        hold(20, get_current_context()["params"]["seconds"])
        return number

    @task(retries=0, retry_policy=Never())
    def hungry(number: int) -> int:
        return grow()

    modest.expand(number=numbers.override(task_id="modest_numbers")("sleepers"))
    hungry.expand(number=numbers.override(task_id="hungry_numbers")("hungry"))


def case(name: str, function: Any, **words: Any) -> None:
    """A DAG of one task."""

    @dag(dag_id=f"fault_{name}")
    def made() -> None:
        task(task_id="it", **({"retries": 0} | words))(function)()

    made()


def children(number: int, mib: int, then: str = "time.sleep(30)") -> list[subprocess.Popen[bytes]]:
    """Programs that take memory each, and stay."""
    code = f"import time; block = bytearray({mib} * 2**20); block[::4096] = b'x' * len(block[::4096]); {then}"
    return [subprocess.Popen([sys.executable, "-c", code]) for _ in range(number)]


def big_array() -> None:
    import numpy

    numpy.ones(10 * 2**30 // 8)


def pool_of_processes() -> None:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(grow, [400] * 4)


def pool_of_futures() -> None:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(4) as pool:
        list(pool.map(grow, [400] * 4))


def joblib_workers() -> None:
    import numpy
    from joblib import Parallel, delayed

    # A function that its workers can import; a DAG file's own ones they cannot.
    Parallel(n_jobs=4)(delayed(numpy.full)(12 * MIB, 1.0) for _ in range(4))


def threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(grow, [400] * 4))


def many_idle_threads() -> int:
    """Sixteen thread stacks reserve 128 MiB and use nearly nothing: no overrun."""
    import threading

    done = threading.Event()
    started = [threading.Thread(target=done.wait) for _ in range(16)]
    for one in started:
        one.start()
    time.sleep(2)
    done.set()
    return len(started)


def shared_by_forks() -> int:
    """100 MiB, read by four forked processes: counted once, no overrun."""
    import multiprocessing

    global _block
    _block = touch(100)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        return sum(pool.map(_size, range(4)))


def pool_that_is_left() -> str:
    """The end of the `with` sends SIGTERM to processes that sleep, and waits for them."""
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map_async(time.sleep, [600, 600])
        time.sleep(1)
    return "left"


_block = bytearray()


def _size(_: int) -> int:
    time.sleep(1)
    return len(_block)


def sits_on_it() -> None:
    """Beyond the budget at once, by less than a task may reserve, and then asks for nothing more."""
    hold(BUDGET + 76, 120)


def catches() -> str:
    """Runs out, gives back what it can, and ends well."""
    blocks = []
    try:
        while True:
            blocks.append(touch(8))
            time.sleep(0.02)
    except MemoryError:
        blocks.clear()
    time.sleep(1)
    return "recovered"


def leaves_a_daemon() -> None:
    """A process that nobody waits for, in a session of its own."""
    subprocess.Popen(["setsid", "sleep", "1234"])
    time.sleep(1)


def large_xcom() -> str:
    return "x" * (200 * MIB)


def large_xcom_of_parts() -> list[str]:
    return ["x" * MIB] * 40


def long_line() -> None:
    """500 MB without an end, in pieces, so that the task itself stays small."""
    for _ in range(500):
        print("x" * 10**6, end="")
    print()


def long_line_of_a_program() -> None:
    """The same from a program that writes to the task's own output, past Python's."""
    code = "import sys\nfor _ in range(500): sys.stdout.write('x' * 10**6)"
    subprocess.run([sys.executable, "-c", code], check=False)


def long_log_record() -> None:
    import logging

    for _ in range(20):
        logging.getLogger("fault").warning("y" * (8 * MIB))


def many_lines() -> str:
    """60 MB in lines of a bearable length: the first part is kept, the task goes on."""
    for number in range(600_000):
        print(f"{number:>6} " + "z" * 92)
    return "the end was reached"


def many_letters() -> None:
    """Two million lines of a letter each: 4 MB of text, 200 of what stands around it in the log's file."""
    for _ in range(2_000_000):
        print("z")


def many_rows() -> None:
    """20 MB through `logging`, nearly all of it in the arguments."""
    import logging

    for _ in range(20_000):
        logging.getLogger("fault").info("row %s", "r" * 1000)


def tells(context: Any) -> None:
    """A callback that takes longer, and more memory, than what is left to a task that ran out of it."""
    block = touch(32)
    time.sleep(10)
    print(f"the callback had {len(block) // MIB} MiB")


def leak() -> int:
    """What a module keeps is gone with the task's process."""
    import builtins

    kept = getattr(builtins, "_kept", [])
    kept.append(touch(16))
    builtins._kept = kept  # type: ignore[attr-defined]
    return len(kept)


def kill_parent(generations: int) -> None:
    """Kills the pool process (1) or Celery's main process (2) above this task."""
    pid = os.getpid()
    for _ in range(generations):
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    print(f"kills process {pid}", flush=True)
    time.sleep(1)  # Its supervisor writes that down.
    # Its child has to end with it, though it ignores signals and nobody waits for it.
    os.kill(pid, 9)
    time.sleep(60)


def escapes() -> None:
    """Stops the guard, lifts its own limit and takes all there is: the kernel has to end it. The guard
    goes on at that moment, and tells whose end it was."""
    import resource

    from taskguard import linux

    (guard,) = [pid for pid in linux.processes() if linux.command(pid).endswith("-m taskguard.guard")]
    leader = os.getpid()
    if os.fork() == 0:
        try:
            while os.getppid() == leader:
                time.sleep(0.001)
        finally:
            os.kill(guard, signal.SIGCONT)
            os._exit(0)
    os.kill(guard, signal.SIGSTOP)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grow(20_000, step_mib=64, pause_s=0)


def stops_its_supervisor(ends: bool) -> None:
    """The pool process above hangs, as one that waits for a dead disk does, and this task ends without
    telling it, or goes on."""
    os.kill(os.getppid(), signal.SIGSTOP)
    if ends:
        os._exit(0)
    time.sleep(1200)


def prints() -> str:
    """As programs and libraries do it."""
    subprocess.run(["echo", "from a program"], stdout=sys.stdout, check=True)
    faulthandler.enable()
    sys.stdout.write(f"in {sys.stdout.encoding}, without an end")
    sys.stdout.flush()
    return "printed"


case("prints", prints)
case("allocation", big_array)
case("grow", grow)
case("callback", grow, on_failure_callback=tells)
case("grow_retry", lambda: grow(BUDGET + 96), retries=1, retry_delay=SECOND)
case("fork_pool", pool_of_processes)
case("futures", pool_of_futures)
case("joblib", joblib_workers)
case("threads", threads)
case("idle_threads", many_idle_threads)
case("shared", shared_by_forks)
case("pool_left", pool_that_is_left)
case("sits", sits_on_it)
case("catches", catches)
case("daemon", leaves_a_daemon)
case("xcom", large_xcom, resources={"ram": 600})
case("xcom_parts", large_xcom_of_parts, resources={"ram": 600})
case("line", long_line)
case("line_of_program", long_line_of_a_program)
case("lines", many_lines)
case("letters", many_letters)
case("rows", many_rows)
case("record", long_log_record)
case("too_large", lambda: None, resources={"ram": 10**6}, retries=3)
case("kill_pool_process", lambda: kill_parent(1), retries=1, retry_delay=SECOND)
case("escapes", escapes)
case("stops_its_supervisor", lambda: stops_its_supervisor(ends=True), retries=1, retry_delay=SECOND)
case("loses_its_supervisor", lambda: stops_its_supervisor(ends=False), retries=1, retry_delay=SECOND)
case("kill_main", lambda: kill_parent(2), retries=1, retry_delay=SECOND)


@dag(dag_id="fault_bash")
def bash() -> None:
    BashOperator(
        task_id="it",
        retries=0,
        bash_command="python3 -c 'import time\nb=[]\nwhile True: b.append(b\"x\"*2**24); time.sleep(0.05)'",
    )


@dag(dag_id="fault_fork_bomb")
def fork_bomb() -> None:
    BashOperator(task_id="it", retries=0, bash_command="f() { f | f & }; f; sleep 60")


@dag(dag_id="fault_twice")
def twice() -> None:
    """A task that was given twice the default, and uses it."""

    @task(retries=0, resources={"ram": 2 * BUDGET})
    def it() -> None:
        hold(BUDGET + 160, 2)

    it()


@dag(dag_id="fault_queue", max_active_tasks=64)
def queue() -> None:
    """Small ones, a large one, and more small ones: all get in."""

    @task(retries=0)
    def small(number: int) -> None:
        hold(20, 5)

    @task(retries=0, resources={"ram": CAPACITY - 48})
    def large() -> None:
        hold(CAPACITY - 160, 2)

    small.expand(number=list(range(6)))
    large()


class Deferred(BaseOperator):
    """Wakes after a while, with something that it is told only once."""

    def execute(self, context: Any) -> None:
        print("this is the first half")
        self.defer(trigger=TimeDeltaTrigger(timedelta(seconds=15)), method_name="wake")

    def wake(self, context: Any, event: Any) -> str:
        return f"woken with {event}"


def waits_for_memory(dag_id: str, *, others: bool) -> None:
    """A task that leaves too little for longer than anybody may wait in a slot, and one that wants all of it;
    with `others` two more behind that, which takes four slots."""

    def sign() -> Path:
        return Path("/tmp") / get_current_context()["run_id"]

    @task(retries=0, resources={"ram": CAPACITY - BUDGET})
    def has_most() -> None:
        sign().touch()
        time.sleep(150)
        sign().unlink()

    @task(retries=0, resources={"ram": SMALL}, execution_timeout=timedelta(minutes=2))
    def first() -> None:
        while not sign().exists():
            time.sleep(0.2)

    @task(retries=0, resources={"ram": CAPACITY})
    def waits(number: int) -> str:
        return "got in"

    @dag(dag_id=dag_id, max_active_tasks=64)
    def made() -> None:
        has_most()
        there = first()
        there >> waits.expand(number=[0, 1] if others else [0])
        if others:
            there >> Deferred(task_id="deferred", retries=0, resources={"ram": SMALL}, priority_weight=100)

    made()


@dag(dag_id="fault_leak", max_active_tasks=64)
def leaks() -> None:
    @task(retries=0)
    def it(number: int) -> int:
        return leak()

    it.expand(number=list(range(200)))


@task
def numbers() -> list[int]:
    """As many as the run asks for."""
    return list(range(get_current_context()["params"]["tasks"]))


@dag(dag_id="fault_behind", params={"tasks": Param(3)}, max_active_tasks=64)
def behind() -> None:
    """More long tasks than there are slots."""

    @task(retries=0)
    def it(number: int) -> None:
        time.sleep(430)

    it.expand(number=numbers())


@dag(dag_id="fault_many", params={"tasks": Param(1000)}, max_active_tasks=64)
def many() -> None:
    @task(retries=0)
    def it(number: int) -> int:
        return number

    it.expand(number=numbers())


storm()
bash()
fork_bomb()
twice()
queue()
waits_for_memory("fault_large_first", others=False)
waits_for_memory("fault_come_back", others=True)
leaks()
behind()
many()
