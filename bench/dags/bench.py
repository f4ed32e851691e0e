"""The benchmark's work. Every task does next to nothing, or a known amount; what is measured is the platform."""

from __future__ import annotations

from airflow.sdk import Param, dag, get_current_context, task


def fibonacci(n: int) -> int:
    """Slow on purpose: CPU and nothing else."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


@dag(dag_id="bench_fan_out", params={"tasks": Param(200)}, max_active_tasks=64)
def fan_out() -> None:
    """Mapped tasks that do nothing, all ready at once."""

    @task
    def numbers() -> list[int]:
        return list(range(get_current_context()["params"]["tasks"]))

    @task
    def nothing(number: int) -> None:
        pass

    nothing.expand(number=numbers())


def chain(dag_id: str, length: int, n: int) -> None:
    """Tasks in a row, each computing a Fibonacci number."""

    @dag(dag_id=dag_id)
    def made() -> None:
        last = None
        for number in range(length):
            this = task(task_id=f"t{number:02}")(lambda: fibonacci(n))()
            if last is not None:
                last >> this
            last = this

    made()


@dag(dag_id="bench_one")
def one() -> None:
    """A single task that does nothing."""

    @task
    def nothing() -> None:
        pass

    nothing()


fan_out()
one()
chain("bench_chain", 20, 1)
chain("bench_small_cpu", 40, 10)
chain("bench_large_cpu", 10, 33)
