"""An Airflow dag of a single task that does nothing."""

from __future__ import annotations

from airflow.sdk import dag, task


@dag
def bench_one() -> None:
    """One task."""

    @task
    def nothing() -> None:
        pass

    nothing()


bench_one()
