"""make user, make user-remove: a person's login in Airflow and in MLflow at once.

`add` makes both with one random password, which is printed once, as the `export` lines that MLflow's
client needs; they can go into a file: `(umask 077; make --silent user NAME=ada > ada.env)`. `remove`
takes both away; the person's runs and models stay.

Exit: 0 done, 1 a service refused (what was made before is taken back), 3 nothing was changed: no
stack, a bad name, one that exists or that does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import connect, instance
from stack.console import say
from stack.errors import run_main
from stack.people import ROLES, People


def main(argv: Sequence[str]) -> int:
    """Adds or removes a person."""
    parser = argparse.ArgumentParser(prog="make user", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add")
    add.add_argument("name")
    add.add_argument("--role", default="user", choices=ROLES)
    verbs.add_parser("remove").add_argument("name")
    arguments = parser.parse_args(argv)
    with People(instance.current()) as people:
        if arguments.verb == "remove":
            places = people.remove(arguments.name)
            say(f"removed   {arguments.name} from {' and '.join(places)}; runs and models stay")
            return 0
        role = ROLES[arguments.role]
        password = people.add(arguments.name, role)
        also = ", administrator of MLflow" if role.mlflow_admin else ""
        say(f"added     {arguments.name}: {role.airflow} in Airflow{also}; the password is shown this once")
        print(connect.exports(connect.tracking(people.settings, arguments.name, password)))
    return 0


if __name__ == "__main__":
    run_main(main)
