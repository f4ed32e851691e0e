"""make memory: what each task was seen to need, and what to give it.

Changes nothing. `--json` prints the same for machines. Exit: 0 done, 3 no stack.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from stack import host, instance, observed, plan, preflight, settings
from stack.compose import Compose
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Prints the worker's record."""
    parser = argparse.ArgumentParser(prog="make memory", description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    here = instance.current()
    seen = observed.read(Compose(here))
    if arguments.json:
        print(seen.model_dump_json(indent=2))
        return 0
    made = preflight.plan_for(host.read(), settings.load(here.settings_file))
    table = Table(box=None, header_style="bold")
    for column in ("task", "runs", "peak MiB", "last", "budget", "overruns", "write into its DAG"):
        table.add_column(column, justify="left" if column in ("task", "write into its DAG") else "right")
    for task in seen.tasks:
        numbers = (task.runs, task.peak, task.last, task.budget, task.overruns)
        table.add_row(f"{task.dag_id}.{task.task_id}", *map(str, numbers), task.advice(made.task_budget))
    console = Console()
    # In a pipe nothing may be broken: the advice is there to be copied.
    wide = console if console.is_terminal else Console(width=200)
    wide.print(table if seen.tasks else "no task has run yet")
    print(slots_line(seen, made))
    return 0


def slots_line(seen: observed.Observed, made: plan.Plan) -> str:
    """How many slots the worker has, and could carry."""
    text = (
        f"\nworker: {made.worker_slots} slots, {made.task_budget} MiB for each task by default, "
        f"{made.task_capacity} MiB for all together"
    )
    needed = observed.typical(seen.tasks)
    if needed is None:
        return text
    could = plan.slots_for(plan.load_sizing(), made, needed)
    return (
        f"{text}\nobserved: {needed} MiB would do for {observed.SHARE:.0%} of all runs; "
        f"memory and CPUs would carry {could} slots of that size (make plan FROM=observed)"
    )


if __name__ == "__main__":
    run_main(main)
