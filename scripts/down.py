"""make down / make clean: stops the stack; `--volumes` deletes its data as well.

Deleting asks at a terminal; without one it needs --yes 1 (make clean YES=1), or the stack's name where it was not
started from this directory. Changes only what carries this stack's label, and nothing where another directory's
stack has it. Exit: 0 done, 1 failed, 2 usage, 3 refused and nothing changed, 4 not stopped in
time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stack import compose, instance, lifecycle, secrets, settings
from stack.console import say
from stack.errors import StackError, run_main


def main(argv: Sequence[str]) -> int:
    """Stops the instance."""
    parser = argparse.ArgumentParser(prog="make down", description=__doc__)
    parser.add_argument("--volumes", action="store_true", help="delete the data and the secrets, too")
    parser.add_argument("--yes", default="", metavar="1|NAME", help="do not ask")
    arguments = parser.parse_args(argv)
    here = instance.current()
    if not arguments.volumes:
        lifecycle.down(here)
        return 0
    # What runs is what .env says; stack.env may have been given another name since.
    values = compose.recorded(here)
    project = values["STACK_NAME"] if values else settings.load(here.settings_file).stack_name
    if not (values or here.settings_file.exists() or here.directory == instance.ROOT):
        raise StackError(
            "E-NOT-YOURS",
            f"{here.directory} has no stack, and {project} may be another's",
            why=f"there is neither stack.env nor .env in {here.directory}",
            fix="correct STACK_DIR; for a stack whose directory is lost, write its STACK_NAME into a stack.env there",
        )
    compose.check_owner(here, project)
    volumes = compose.volumes(project)
    # Without a .env these are the volumes of another clone that is stopped, as likely as of a directory that is lost.
    foreign = bool(volumes) and not values
    if arguments.yes != project and (foreign or arguments.yes != "1"):
        confirm(project, volumes, foreign=foreign)
    try:
        if values and compose.in_place(here, values):
            lifecycle.down(here, volumes=True)
        else:
            # The way out of E-SECRET-LOST when the whole directory of a stack was lost, or has moved.
            compose.remove_project(project)
        # The secrets fit only the data that has just gone; the next `make up` makes new ones.
        secrets.remove(here.secrets)
        here.env_file.unlink(missing_ok=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("data may be deleted, in part or all of it; `make clean` deletes the rest") from None
    say("deleted: containers, volumes, secrets. stack.env, images and your DAGs are kept")
    return 0


def confirm(project: str, volumes: list[str], *, foreign: bool) -> None:
    """Returns when the operator types the stack's name. Raises StackError (E-CONFIRM) otherwise."""
    say(f"This deletes all data of {project}: {', '.join(volumes) or '(no volumes)'}, and secrets/.")
    why, fix = "deleting data needs a person at a terminal, or YES=1", "make clean YES=1"
    if foreign:
        say("It was not started from here: another clone may have it.")
        why = f"the volumes of {project} were not made from this directory, and may be another clone's"
        fix = (
            f"make clean YES={project}\n"
            "Where another clone has this name, give this one a STACK_NAME of its own in stack.env."
        )
    answer = ""
    if sys.stdin.isatty():
        say(f"Type {project} to go on:")
        answer = sys.stdin.readline().strip()
    if answer != project:
        raise StackError("E-CONFIRM", "not confirmed", why=why, fix=fix)


if __name__ == "__main__":
    run_main(main)
