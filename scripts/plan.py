"""make plan: prints the memory plan for this host without writing it.

`--memory 8g --cpus 4` plans for another host, with what stack.env opts into; `--examples` prints the table
of docs/memory.md, `--picture` its picture (SVG).
`--from observed` plans with what the tasks were seen to need (make memory), shows what would change,
and writes TASK_MEMORY into stack.env after a yes (unattended: --yes). Otherwise nothing is changed.
Exit: 0 done, 3 the stack does not fit, or nobody said yes.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence

from stack import console, host, instance, observed, picture, plan, preflight, settings
from stack.compose import Compose
from stack.errors import Exit, StackError, run_main


def main(argv: Sequence[str]) -> int:
    """Prints a plan."""
    parser = argparse.ArgumentParser(prog="make plan", description=__doc__)
    parser.add_argument("--memory", type=settings.parse_size, help="the host's memory, such as 8g")
    parser.add_argument("--cpus", type=settings.parse_cpus, help="the host's CPUs")
    parser.add_argument("--examples", action="store_true", help="a table for several hosts, as Markdown")
    parser.add_argument("--picture", action="store_true", help="the same as a picture (SVG)")
    parser.add_argument(
        "--from", dest="source", choices=["observed"], help="plan with what the tasks were seen to need"
    )
    parser.add_argument("--yes", action="store_true", help="write without asking")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    sizing = plan.load_sizing()
    if arguments.source:
        return take_over(instance.current(), yes=arguments.yes)
    if arguments.examples or arguments.picture:
        print(picture.render(sizing) if arguments.picture else plan.render_examples(sizing))
        return 0
    chosen = settings.load(instance.current().settings_file)
    if arguments.memory or arguments.cpus:
        memory = arguments.memory // plan.MIB if arguments.memory else host.read().memory
        made = plan.make_plan(sizing, memory, arguments.cpus or host.cpu_count(), opted=chosen.opted)
    else:
        made = preflight.plan_for(host.read(), chosen)
    print(made.model_dump_json(indent=2) if arguments.json else plan.render(made))
    return 0


def take_over(here: instance.Instance, *, yes: bool) -> int:
    """Shows, and writes, the plan that fits the tasks."""
    needed = observed.typical(observed.read(Compose(here)).tasks)
    if needed is None:
        raise StackError(
            "E-OBSERVED",
            "no task has been observed yet",
            why="the worker's record is empty",
            fix="run your DAGs first, then look at `make memory`",
        )
    before = here.settings_file.read_text(encoding="utf-8") if here.settings_file.exists() else ""
    after = with_setting(before, "TASK_MEMORY", f"{needed}m")
    found = host.read()
    old, new = (plan.render(preflight.plan_for(found, settings.parse(text))) for text in (before, after))
    if old == new:
        print("the plan fits what was observed: nothing to change")
        return 0
    for title, left, right in (("stack.env", before, after), ("plan", old, new)):
        print("\n".join(difflib.unified_diff(left.splitlines(), right.splitlines(), title, title, lineterm="", n=0)))
    if not yes and not console.confirmed("write this to stack.env?"):
        raise StackError(
            "E-CONFIRM", "stack.env was not changed", why="nobody said yes", fix="make plan FROM=observed YES=1"
        )
    instance.write(here.settings_file, after)
    print("written; `make up` puts it in place (running tasks may end first)")
    return Exit.DONE


def with_setting(text: str, key: str, value: str) -> str:
    """The text of a stack.env with one key set, where it stands or at the end."""
    line = f"{key}={value}"
    # One that counts comes before one that is commented out.
    for written in (rf"^\s*{key}\s*=.*$", rf"^#{key}=.*$"):
        changed, count = re.subn(written, line, text, count=1, flags=re.MULTILINE)
        if count:
            return changed
    return f"{text.rstrip()}\n{line}\n".lstrip()


if __name__ == "__main__":
    run_main(main)
