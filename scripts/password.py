"""make password: prints the password of the first login (Airflow and MLflow) on stdout.

Changes nothing. Exit: 0 done, 3 the stack has not been prepared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import connect, instance
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Prints the password."""
    argparse.ArgumentParser(prog="make password", description=__doc__).parse_args(argv)
    print(connect.admin_password(instance.current()))
    return 0


if __name__ == "__main__":
    run_main(main)
