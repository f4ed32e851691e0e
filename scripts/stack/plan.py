"""The memory plan: a pure function from a host's size to every limit and concurrency.

Sums stay below the budget; floors come first, what is left is shared by weight, and what capped
services cannot use goes to the others. No engine, no files but config/sizing.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from stack.errors import StackError
from stack.instance import ROOT

MIB = 2**20
MIN_TASK_MIB = 64
"""A task that imports nothing took 8 to 25 MiB."""
SIZING_FILE = ROOT / "config" / "sizing.yaml"
MOST_SHARED_BUFFERS = 128
"""MiB of buffers that Postgres keeps for itself, its own default; a quarter of its memory below that, its own advice.
They are never given back, which the page cache is; what that costs and gives: docs/performance.md."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reserve(_Model):
    """Memory that the stack leaves to the host: a fraction of it, in MiB at least `floor`."""

    fraction: float = Field(ge=0, lt=1)
    floor: int = Field(ge=0)


class ServiceSizing(_Model):
    """One service's claim, in MiB; see config/sizing.yaml."""

    floor: int = Field(gt=0)
    weight: float = Field(ge=0)
    cap: int | None
    reserve: float = Field(ge=0, le=1)


class WorkerSizing(_Model):
    """What the worker's memory is made of, in MiB."""

    base: int
    slot: int
    task: int
    min_slots: int
    slots_per_cpu: float
    max_slots: int


class ProcessSizing(_Model):
    """Parallel processes of a service: MiB and CPUs for each, and how many at the most."""

    per_worker: int
    cpus_per_worker: float = Field(gt=0)
    max_workers: int


class Sizing(_Model):
    """config/sizing.yaml."""

    reserve: Reserve
    services: dict[str, ServiceSizing]
    opt_in: dict[str, ServiceSizing]
    worker: WorkerSizing
    apiserver: ProcessSizing
    mlflow: ProcessSizing
    dag_processor: ProcessSizing

    @property
    def floor(self) -> int:
        """MiB that the stack needs at the least, the host's reserve not counted."""
        return sum(service.floor for service in self.services.values())

    def with_opted(self, names: Collection[str]) -> Sizing:
        """The same with these opt-in services among the others."""
        return self.model_copy(update={"services": self.services | {name: self.opt_in[name] for name in names}})


class Limit(_Model):
    """One container's memory, in MiB."""

    limit: int
    reservation: int


class Plan(_Model):
    """Every figure that depends on the host."""

    memory: int
    """MiB that the plan was made for."""
    budget: int
    """MiB that all limits together may reach."""
    cpus: float
    limits: dict[str, Limit]
    off: dict[str, Limit]
    """Of opt-in services that are off: not in the sum, and known to the Compose files all the same."""
    worker_slots: int
    task_budget: int
    """MiB that a task gets which asks for nothing."""
    task_capacity: int
    """MiB that all tasks together can have, and so the most that one can ask for."""
    apiserver_workers: int
    mlflow_workers: int
    dag_parsers: int
    parallelism: int
    postgres_connections: int

    @property
    def total(self) -> int:
        """MiB of all limits together."""
        return sum(limit.limit for limit in self.limits.values())

    def environment(self) -> dict[str, str]:
        """The plan as variables for the Compose files."""
        values = {}
        for name, limit in (self.limits | self.off).items():
            values[f"{name.upper()}_MEMORY"] = f"{limit.limit}m"
            values[f"{name.upper()}_RESERVATION"] = f"{limit.reservation}m"
        postgres, redis, minio = (self.limits[name].limit for name in ("postgres", "redis", "minio"))
        return values | {
            "WORKER_CONCURRENCY": str(self.worker_slots),
            "WORKER_TASK_MEMORY": str(self.task_budget),
            "WORKER_TASK_CAPACITY": str(self.task_capacity),
            "AIRFLOW_PARALLELISM": str(self.parallelism),
            "APISERVER_WORKERS": str(self.apiserver_workers),
            "MLFLOW_WORKERS": str(self.mlflow_workers),
            "DAG_PARSERS": str(self.dag_parsers),
            "POSTGRES_SHARED_BUFFERS": f"{min(postgres // 4, MOST_SHARED_BUFFERS)}MB",
            "POSTGRES_EFFECTIVE_CACHE": f"{postgres * 3 // 4}MB",
            "POSTGRES_SHM": f"{max(64, postgres // 4)}m",
            "POSTGRES_MAX_CONNECTIONS": str(self.postgres_connections),
            # The rest is for the fork that rewrites the append-only file, and for client buffers.
            "REDIS_MAXMEMORY": f"{redis * 6 // 10}mb",
            "MINIO_GOMEMLIMIT": f"{minio * 8 // 10}MiB",
        }


def load_sizing(path: Path = SIZING_FILE) -> Sizing:
    """Reads config/sizing.yaml, strictly."""
    data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Sizing.model_validate(data)


def make_plan(
    sizing: Sizing,
    memory: int,
    cpus: float,
    *,
    whole: bool = False,
    worker: int | None = None,
    task: int | None = None,
    opted: Collection[str] = (),
) -> Plan:
    """The plan for `memory` MiB and `cpus` CPUs, with the opt-in services that are on.

    With `whole` the memory is already the stack's own (STACK_MEMORY): nothing is kept back for the
    host. `worker` and `task` are the operator's own figures in MiB for the worker's limit and for
    each task. Raises StackError: E-MEM-LOW with the figure that is missing when the floors do not
    fit, E-MEM-WORKER and E-MEM-TASK when the operator's figures do not.
    """
    off = {name: service for name, service in sizing.opt_in.items() if name not in opted}
    sizing = sizing.with_opted(opted)
    kept = 0 if whole else max(sizing.reserve.floor, math.ceil(memory * sizing.reserve.fraction))
    budget = memory - kept
    if budget < sizing.floor:
        needed = (
            sizing.floor
            if whole
            else math.ceil(max(sizing.floor + sizing.reserve.floor, sizing.floor / (1 - sizing.reserve.fraction)))
        )
        source = "STACK_MEMORY is" if whole else "this host has"
        ways = ["raise STACK_MEMORY in stack.env" if whole else "give the host (or the Docker VM) more memory"]
        ways += [f"set {name.upper()}=off ({sizing.opt_in[name].floor} MiB)" for name in opted]
        raise StackError(
            "E-MEM-LOW",
            f"{source} {memory:,} MiB; the stack needs {needed:,} MiB",
            why="with less, the kernel would kill services under load: that is the WorkerLostError of the tutorials",
            fix=" or ".join(ways),
        )
    if worker is not None:
        sizing = _with_worker(sizing, worker, budget)
    limits = _share(sizing, budget)
    slots, task_budget, capacity = _slots(sizing.worker, limits["worker"], cpus, task)
    apiserver_workers = _processes(sizing.apiserver, limits["apiserver"], cpus)
    mlflow_workers = _processes(sizing.mlflow, limits["mlflow"], cpus)
    return Plan(
        memory=memory,
        budget=budget,
        cpus=cpus,
        limits={name: _limit(sizing.services[name], limit) for name, limit in limits.items()},
        off={name: _limit(service, service.floor) for name, service in off.items()},
        worker_slots=slots,
        task_budget=task_budget,
        task_capacity=capacity,
        apiserver_workers=apiserver_workers,
        mlflow_workers=mlflow_workers,
        dag_parsers=_processes(sizing.dag_processor, limits["dag_processor"], cpus),
        # A few more than slots keep the queue from running dry while the scheduler rests; with many more an
        # urgent task would stand behind all of them. Where it runs dry all the same, wakeup.pace sends more.
        parallelism=slots + 8,
        # One per pool child (results), pools of 15 at the most for each Airflow process and MLflow worker,
        # psql sessions of an operator.
        postgres_connections=30 + slots + 15 * (3 + apiserver_workers) + 2 * 15 * mlflow_workers,
    )


def _limit(service: ServiceSizing, limit: int) -> Limit:
    return Limit(limit=limit, reservation=int(limit * service.reserve))


def _with_worker(sizing: Sizing, limit: int, budget: int) -> Sizing:
    """The same with the worker's limit given: the others share what is left."""
    worker = sizing.services["worker"]
    most = budget - (sizing.floor - worker.floor)
    if not worker.floor <= limit <= most:
        raise StackError(
            "E-MEM-WORKER",
            f"WORKER_MEMORY is {limit} MiB; it can be {worker.floor} to {most} MiB here",
            why="less is too little for two tasks, more would take from the other services what they need",
            fix="correct WORKER_MEMORY in stack.env (with its unit, as in 2g), or leave it empty",
        )
    given = worker.model_copy(update={"floor": limit, "cap": limit})
    return sizing.model_copy(update={"services": sizing.services | {"worker": given}})


def _slots(worker: WorkerSizing, limit: int, cpus: float, task: int | None) -> tuple[int, int, int]:
    """Slots, MiB for each task, MiB for all tasks together."""
    for_slots = limit - worker.base
    most = for_slots - worker.slot
    if task is not None and not MIN_TASK_MIB <= task <= most:
        raise StackError(
            "E-MEM-TASK",
            f"TASK_MEMORY is {task} MiB; it can be {MIN_TASK_MIB} to {most} MiB here",
            why="less is too little to start, more is not there even for a single task",
            fix="correct TASK_MEMORY in stack.env (with its unit, as in 400m), or leave it empty; a single large "
            'task is better given resources={"ram": ...} in its DAG',
        )
    by_memory = for_slots // (worker.slot + (task or worker.task))
    by_cpu = math.ceil(cpus * worker.slots_per_cpu)
    least = worker.min_slots if task is None else 1
    slots = max(least, min(by_memory, by_cpu, worker.max_slots))
    capacity = for_slots - slots * worker.slot
    return slots, task or capacity // slots, capacity


def slots_for(sizing: Sizing, made: Plan, task: int) -> int:
    """How many slots of `task` MiB a plan's worker could carry."""
    return _slots(sizing.worker, made.limits["worker"].limit, made.cpus, max(MIN_TASK_MIB, task))[0]


def _share(sizing: Sizing, budget: int) -> dict[str, int]:
    """Limits in MiB: floors, then the rest by weight; what a cap refuses is shared again."""
    limits = {name: float(service.floor) for name, service in sizing.services.items()}
    rest = float(budget - sizing.floor)
    open_ones = {name for name, service in sizing.services.items() if service.weight > 0}
    while rest > 1 and open_ones:
        weights = sum(sizing.services[name].weight for name in open_ones)
        offered = {name: rest * sizing.services[name].weight / weights for name in open_ones}
        for name, share in offered.items():
            cap = sizing.services[name].cap
            taken = share if cap is None else min(share, max(0.0, cap - limits[name]))
            limits[name] += taken
            rest -= taken
            if taken < share:
                open_ones.discard(name)
    # Whole multiples of 8 MiB, downwards: the sum stays within the budget.
    return {name: max(sizing.services[name].floor, int(limit) // 8 * 8) for name, limit in limits.items()}


def _processes(sizing: ProcessSizing, limit: int, cpus: float) -> int:
    return max(1, min(limit // sizing.per_worker, int(cpus / sizing.cpus_per_worker), sizing.max_workers))


def render(plan: Plan) -> str:
    """The plan as a table for people."""
    lines = [
        f"memory {plan.memory / 1024:.1f} GiB, {plan.cpus:g} CPUs; budget {plan.budget} MiB, planned {plan.total} MiB",
        f"worker: {plan.worker_slots} slots, {plan.task_budget} MiB for each task, "
        f"up to {plan.task_capacity} MiB for one that asks",
        f"API server: {plan.apiserver_workers} process(es); MLflow: {plan.mlflow_workers}; "
        f"DAG files read at once: {plan.dag_parsers}",
        "",
        f"{'service':<16}{'limit MiB':>10}{'reserved':>10}",
    ]
    for name, limit in plan.limits.items():
        lines.append(f"{name.replace('_', '-'):<16}{limit.limit:>10}{limit.reservation:>10}")
    return "\n".join(lines)


EXAMPLE_HOSTS = ((4, 2), (8, 2), (16, 4), (24, 2), (64, 16))
"""GiB and CPUs of the hosts in docs/memory.md's table."""


def render_examples(sizing: Sizing) -> str:
    """The table of docs/memory.md, as Markdown: one column a host."""
    plans = [make_plan(sizing, memory * 1024, cpus) for memory, cpus in EXAMPLE_HOSTS]
    head = "| | " + " | ".join(f"{memory} GiB, {cpus} CPUs" for memory, cpus in EXAMPLE_HOSTS) + " |"
    rows = [head, "|---|" + "---:|" * len(plans)]

    def row(label: str, values: list[int]) -> None:
        rows.append(f"| {label} | " + " | ".join(str(value) for value in values) + " |")

    row("budget", [plan.budget for plan in plans])
    for name in sizing.services:
        row(name.replace("_", "-"), [plan.limits[name].limit for plan in plans])
    row("**sum of limits**", [plan.total for plan in plans])
    row("worker slots", [plan.worker_slots for plan in plans])
    row("MiB for each task", [plan.task_budget for plan in plans])
    row("MiB for one task at the most", [plan.task_capacity for plan in plans])
    row("API server processes", [plan.apiserver_workers for plan in plans])
    row("MLflow processes", [plan.mlflow_workers for plan in plans])
    row("DAG files read at once", [plan.dag_parsers for plan in plans])
    return "\n".join(rows)
