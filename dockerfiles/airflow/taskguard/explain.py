"""What an operator reads when memory ended a task: one paragraph, the same everywhere.

Pure text; sizes are MiB. Every sentence answers one question: what, how much, which process, when,
what was free, what to set and where.
"""

from __future__ import annotations

from dataclasses import dataclass

MORE = "More: docs/memory.md#when-a-task-needs-more"


@dataclass(frozen=True)
class Figures:
    """What was known when a task overran."""

    kind: str
    """`budget`, `allocation`, `supervisor`, `processes`, `log` or `kernel`: see _WHAT."""
    budget: int
    source: str
    """Where the budget came from, as in `from the plan`."""
    peak: int
    process: str
    processes: int
    at: str
    """Time of day, with its zone."""
    after_s: float
    """Seconds since the task's start."""
    free: int
    capacity: int
    next_budget: int | None
    """What a retry will get; None where retries get no more."""
    detail: str = ""


_WHAT = {
    "budget": "this task was ended because it took more memory than its budget",
    "allocation": "this task was refused memory: a single request went beyond its budget",
    "supervisor": "this task was ended because the process that supervises it grew by {detail} MiB: it wrote a line "
    "without end, or passed on something very large",
    "processes": "this task was ended because it started {detail} processes",
    "log": "this task was ended because its log grew to {detail} MiB",
    "kernel": "the kernel ended this task because the worker's container was full",
}
_FIX = {
    "supervisor": "Write shorter lines, and put large results into S3 or MLflow instead of returning them.",
    "processes": "Start fewer processes at a time (n_jobs, max_workers).",
    "log": "Log less, or write the output to S3.",
}


def paragraph(figures: Figures) -> str:
    """The explanation that a task's log ends with."""
    f = figures
    several = f" of {f.processes} processes" if f.processes > 1 else ""
    # The kernel is quicker than the guard's looks.
    peak = "last seen at" if f.kind == "kernel" else "peak"
    text = (
        f"Out of memory: {_WHAT[f.kind].format(detail=f.detail)}. "
        f"Budget {f.budget} MiB ({f.source}); {peak} {f.peak} MiB at {f.at}, {f.after_s:.1f} s after the start; "
        f"largest process: {f.process}{several}. "
        f"Then free for tasks in this worker: {f.free} of {f.capacity} MiB. "
    )
    if f.kind in _FIX:
        return text + f"{_FIX[f.kind]} {MORE}"
    most = max(f.peak, f.budget)
    wanted = suggestion(most * 2)
    if wanted > f.capacity >= most * 1.25:
        wanted = f.capacity
    if wanted <= f.capacity:
        text += (
            f'To give this task more: resources={{"ram": {wanted}}} on its operator; '
            f"every task: TASK_MEMORY={wanted}m in stack.env, then make up. "
        )
    else:
        text += (
            f"This worker can give at most {f.capacity} MiB to one task: make the task smaller, "
            "or raise STACK_MEMORY in stack.env (or the host's memory), then make up. "
        )
    if f.next_budget:
        text += f"If it is retried, it gets {f.next_budget} MiB. "
    return text + f"make memory shows what each task needs. {MORE}"


def never(budget: int, capacity: int) -> str:
    """For a task that asks for more than the worker has."""
    return (
        f'Out of memory: this task asks for {budget} MiB (resources={{"ram": {budget}}}); this worker can give at most '
        f"{capacity} MiB to one task, even when nothing else runs. It was not started. "
        f"Ask for less, or raise STACK_MEMORY in stack.env (or the host's memory), then make up. {MORE}"
    )


def suggestion(peak: int) -> int:
    """A round figure not below a peak: multiples of 32 MiB."""
    return max(64, -(-peak // 32) * 32)
