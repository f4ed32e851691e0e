"""An Airflow dag of mapped tasks that do nothing, all ready at once."""

from __future__ import annotations

from airflow.sdk import Param, dag, get_current_context, task


@dag(params={"tasks": Param(200)}, max_active_tasks=64)
def bench_fan_out() -> None:
    """As many tasks as the run asks for."""

    @task
    def numbers() -> list[int]:
        return list(range(get_current_context()["params"]["tasks"]))

    @task
    def nothing(number: int) -> None:
        pass

    nothing.expand(number=numbers())


bench_fan_out()
