"""What the benchmark's tasks do: next to nothing, or a known amount; what is measured is the platform."""

from __future__ import annotations

from airflow.sdk import dag, task


def fibonacci(n: int) -> int:
    """Slow on purpose: CPU and nothing else."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def chain(dag_id: str, length: int, n: int) -> None:
    """A DAG of tasks in a row, each computing a Fibonacci number."""

    @dag(dag_id=dag_id)
    def made() -> None:
        last = None
        for number in range(length):
            this = task(task_id=f"t{number:02}")(lambda: fibonacci(n))()
            if last is not None:
                last >> this
            last = this

    made()
