"""What the tasks were seen to need, and what follows for the plan. Reads the worker's ledger."""

from __future__ import annotations

import json
import math

from pydantic import BaseModel, ConfigDict

from stack.compose import Compose
from stack.errors import Exit, StackError
from stack.process import capture

WORKER = "airflow-worker"
MARGIN = 1.25
"""Room above the highest peak seen: peaks of the same task differed by up to a fifth between runs."""
STEP_MIB = 32
SHARE = 0.95
"""The default budget should do for this part of all runs; the rest declare `resources`."""


class Task(BaseModel):
    """One row of the ledger; sizes in MiB."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dag_id: str
    task_id: str
    runs: int
    peak: int
    last: int
    budget: int
    declared: int | None
    overruns: int

    @property
    def suggested(self) -> int:
        """MiB that this task should ask for."""
        return round_up(self.peak * MARGIN)

    def advice(self, default: int) -> str:
        """What to write into the DAG; empty where nothing needs to change. `default`: MiB for a task
        that asks for nothing."""
        given = self.declared or default
        if self.suggested > given:
            return f'resources={{"ram": {self.suggested}}}'
        if self.overruns and self.declared is None and self.peak < given:
            return f'resources={{"ram": {2 * given}}} (it asked for more than its budget at once)'
        if self.declared is not None and self.peak and self.declared > 2 * self.suggested:
            return f'resources={{"ram": {self.suggested}}} (it has asked for more than twice that)'
        return ""


class Overrun(BaseModel):
    """A task that ran out of memory; sizes in MiB, `at` in seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dag_id: str
    task_id: str
    map_index: int
    try_number: int
    at: float
    told: str


class Observed(BaseModel):
    """What the worker's ledger and its guard say."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    guard: dict[str, object]
    tasks: list[Task]
    overruns: list[Overrun]


def round_up(mib: float) -> int:
    """The next multiple of STEP_MIB, at least 64."""
    return max(64, math.ceil(mib / STEP_MIB) * STEP_MIB)


def read(stack: Compose, since: float = 0) -> Observed:
    """Asks the worker; `since` (seconds since 1970) bounds the overruns. Raises StackError."""
    worker = stack.container(WORKER)
    if worker.state != "running":
        raise StackError(
            "E-NO-STACK",
            "the worker does not run, and it keeps the record",
            why=f"its container is {worker.state}",
            fix="make up, then make status",
        )
    told = capture(
        ["docker", "exec", worker.name, "python3", "-m", "taskguard.report", str(since)], timeout=60, check=False
    )
    try:
        return Observed.model_validate(json.loads(told.out))
    except ValueError as error:
        raise StackError(
            "E-LEDGER",
            "the worker's record of memory cannot be read",
            why=(told.err or str(error))[-500:],
            fix="see `make logs S=airflow-worker`; a damaged record is put aside when the worker starts",
            exit_code=Exit.FAILED,
        ) from error


def typical(tasks: list[Task]) -> int | None:
    """MiB that would do for SHARE of all runs; None where nothing was observed."""
    total = sum(task.runs for task in tasks)
    passed = 0
    for task in sorted(tasks, key=lambda one: one.suggested):
        passed += task.runs
        if passed >= SHARE * total:
            return task.suggested
    return None
