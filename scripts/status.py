"""make status: each service's state, health, memory against its limit, and the addresses.

Changes nothing. `--json` prints the same for machines. Exit: 0 all healthy, 1 something is not, 3 no stack or
no engine that answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from stack import compose, instance
from stack.errors import run_main
from stack.process import capture


def main(argv: Sequence[str]) -> int:
    """Prints the instance's state."""
    parser = argparse.ArgumentParser(prog="make status", description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    stack = compose.Compose(instance.current())
    found = stack.containers()
    missing = sorted(set(stack.hashes()) - {container.service for container in found})
    if arguments.json:
        print(json.dumps({"containers": [asdict(container) for container in found], "missing": missing}))
    else:
        print_table(found, missing, memory_use([container.name for container in found if container.state == "running"]))
    return 0 if found and not missing and all(container.good for container in found) else 1


def memory_use(names: Sequence[str]) -> dict[str, str]:
    """Container -> `used / limit`, as the engine counts."""
    if not names:
        return {}
    lines = capture(
        ["docker", "stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}\t{{.CPUPerc}}", *names], timeout=60
    ).out.splitlines()
    return {name: f"{memory}\t{cpu}" for name, memory, cpu in (line.split("\t") for line in lines)}


def print_table(found: Sequence[compose.Container], missing: Sequence[str], memory: dict[str, str]) -> None:
    """The table for people, on stdout."""
    table = Table(box=None, header_style="bold")
    for column in ("service", "state", "memory", "cpu", "restarts"):
        table.add_column(column, justify="left" if column in ("service", "state") else "right")
    for container in found:
        state = container.health or ("done" if container.good else f"{container.state} (code {container.exit_code})")
        used, _, cpu = memory.get(container.name, "").partition("\t")
        colour = "green" if container.good else "red"
        table.add_row(container.service, f"[{colour}]{state}[/{colour}]", used, cpu, str(container.restarts))
    for name in missing:
        table.add_row(name, "[red]not created[/red]", "", "", "")
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
