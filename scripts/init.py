"""make init: checks this host and writes stack.env, the plan (.env) and the secrets.

Changes: files of the instance; installs and starts Docker Engine where it is missing and we may.
A second run changes nothing and says so. Exit: 0 done, 1 failed, 2 usage, 3 refused, nothing changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import instance, lifecycle
from stack.console import say
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Prepares the instance."""
    argparse.ArgumentParser(prog="make init", description=__doc__).parse_args(argv)
    prepared = lifecycle.prepare(instance.current())
    if prepared.written:
        say(f"init: wrote {lifecycle.summary(prepared.written)}")
    else:
        say("init: nothing to do, everything is current")
    return 0


if __name__ == "__main__":
    run_main(main)
