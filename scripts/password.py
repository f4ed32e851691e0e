"""make password: prints the password of the first login (Airflow and MLflow) on stdout.

Changes nothing. Exit: 0 done, 3 the stack has not been prepared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import instance
from stack.errors import StackError, run_main


def main(argv: Sequence[str]) -> int:
    """Prints the password."""
    argparse.ArgumentParser(prog="make password", description=__doc__).parse_args(argv)
    path = instance.current().secrets / "admin_password"
    try:
        print(path.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise StackError(
            "E-NO-INIT", f"{path} cannot be read", why=str(error), fix="run `make up` first, as the same user"
        ) from error
    return 0


if __name__ == "__main__":
    run_main(main)
