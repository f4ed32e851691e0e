"""make up / make restart: brings the stack up, from whatever state it is in, and waits until it is healthy.

`--restart` stops everything first, once all that can be refused or can fail beforehand is done.

Changes: what `make init` changes, images, containers, networks and volumes of this stack. Running
it again when all is well changes nothing. Exit: 0 healthy, 1 failed, 3 refused and nothing changed,
4 not pulled, stopped or healthy in time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stack import instance, lifecycle
from stack.console import say
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Brings the instance up and prints where it is."""
    parser = argparse.ArgumentParser(prog="make up", description=__doc__)
    parser.add_argument("--restart", action="store_true", help="stop everything first; data is kept")
    arguments = parser.parse_args(argv)
    here = instance.current()
    prepared = lifecycle.up(here, restart=arguments.restart)
    # A password belongs on a person's screen, not in the log of a provisioning job.
    say("\n" + lifecycle.addresses(prepared, here, show_password=sys.stderr.isatty()))
    return 0


if __name__ == "__main__":
    run_main(main)
