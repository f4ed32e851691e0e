"""make env: prints what an MLflow client needs, as `export` lines for a shell, a notebook or direnv.

They are the first login's. With a command behind `--`, runs it with these variables and prints nothing.

Changes nothing. Exit: 0 done, 3 the stack has not been prepared; else the command's own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence

from stack import connect, instance, settings
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Prints the lines, or runs the command."""
    parser = argparse.ArgumentParser(prog="make env", description=__doc__)
    parser.add_argument("command", nargs="*", help="runs with the variables")
    arguments = parser.parse_args(argv)
    here = instance.current()
    chosen = settings.load(here.settings_file)
    variables = connect.tracking(chosen, chosen.admin_user, connect.admin_password(here))
    if arguments.command:
        return subprocess.run(arguments.command, env=os.environ | variables, check=False).returncode
    print(connect.exports(variables))
    return 0


if __name__ == "__main__":
    run_main(main)
