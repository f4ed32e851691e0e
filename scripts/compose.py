"""make logs / shell / airflow: Docker Compose with this instance's files and plan.

    compose.py COMPOSE-ARGUMENT...

Exit: Compose's own code; 3 when the stack has not been prepared, or Airflow's image is not here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from stack import compose, instance
from stack.errors import StackError, run_main
from stack.process import capture


def main(argv: Sequence[str]) -> int:
    """Becomes `docker compose`: signals and the terminal are its own."""
    words = list(argv)
    if words[:1] in (["exec"], ["run"]) and not sys.stdin.isatty():
        words.insert(1, "-T")
    stack = compose.Compose(instance.current())
    if words[:1] == ["run"] and "airflow-cli" in words:
        check_image("{IMAGE_PREFIX}/airflow:{AIRFLOW_TAG}".format(**stack.values))
    command = stack.command(*words)
    os.execvpe(command[0], command, {**os.environ, **stack.variables})


def check_image(name: str) -> None:
    """Raises StackError (E-IMAGE) where this engine does not have an image: Compose gets none by itself."""
    if capture(["docker", "image", "inspect", name], timeout=30, check=False).code != 0:
        raise StackError(
            "E-IMAGE",
            f"this engine does not have {name}",
            why="it was removed, or not made yet; Compose does not look for it elsewhere",
            fix="`make up` builds or pulls it; `make init && make build` builds it and starts nothing",
        )


if __name__ == "__main__":
    run_main(main)
