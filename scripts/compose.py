"""make logs / shell / airflow: Docker Compose with this instance's files and plan.

    compose.py COMPOSE-ARGUMENT...

Exit: Compose's own code; 3 when the stack has not been prepared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from stack import compose, instance
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Becomes `docker compose`: signals and the terminal are its own."""
    words = list(argv)
    if words[:1] in (["exec"], ["run"]) and not sys.stdin.isatty():
        words.insert(1, "-T")
    stack = compose.Compose(instance.current())
    command = stack.command(*words)
    os.execvpe(command[0], command, {**os.environ, **stack.variables})


if __name__ == "__main__":
    run_main(main)
