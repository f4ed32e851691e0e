"""make plan: prints the memory plan for this host without writing it.

`--memory 8g --cpus 4` plans for another host; `--examples` prints the table of docs/memory.md.
Changes nothing. Exit: 0 done, 3 the stack does not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import host, instance, plan, preflight, settings
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Prints a plan."""
    parser = argparse.ArgumentParser(prog="make plan", description=__doc__)
    parser.add_argument("--memory", type=settings.parse_size, help="the host's memory, such as 8g")
    parser.add_argument("--cpus", type=float, help="the host's CPUs")
    parser.add_argument("--examples", action="store_true", help="a table for several hosts, as Markdown")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    sizing = plan.load_sizing()
    if arguments.examples:
        print(plan.render_examples(sizing))
        return 0
    if arguments.memory or arguments.cpus:
        memory = arguments.memory // plan.MIB if arguments.memory else host.read().memory
        made = plan.make_plan(sizing, memory, arguments.cpus or host.cpu_count())
    else:
        made = preflight.plan_for(host.read(), settings.load(instance.current().settings_file))
    print(made.model_dump_json(indent=2) if arguments.json else plan.render(made))
    return 0


if __name__ == "__main__":
    run_main(main)
