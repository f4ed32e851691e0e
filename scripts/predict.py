"""make predict FILE=rows.csv: sends the rows of a file to the served model and prints its answer as JSON.

The file is CSV with a line of column names, or JSON of MLflow's scoring protocol; its name says which.

Changes: the rows and their predictions are in the predictions' log. Exit: 0 done, 1 the rows were refused, 3 serving
is off, does not answer, has no model, or the file is none that can be sent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from stack import connect, instance, settings
from stack.errors import StackError, run_main

KINDS = {".csv": "text/csv", ".json": "application/json"}
LARGEST = 5 << 20
"""Bytes that serving takes at once (dockerfiles/serving/serving/app.py)."""


def main(argv: Sequence[str]) -> int:
    """Sends the file."""
    parser = argparse.ArgumentParser(prog="make predict", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE=…")
    arguments = parser.parse_args(argv)
    here = instance.current()
    with connect.serving(here, settings.load(here.settings_file)) as serving:
        body, kind = read(arguments.file)
        print(json.dumps(serving.predict(body, kind)))
    return 0


def read(path: Path) -> tuple[bytes, str]:
    """The file's bytes and their content type. Raises StackError (E-ROWS)."""
    kind = KINDS.get(path.suffix.lower())
    try:
        if not kind:
            why = "its name ends neither with .csv nor with .json"
        elif (size := path.stat().st_size) > LARGEST:
            why = f"it has {size} bytes; serving takes {LARGEST} at once: send its rows in parts"
        else:
            return path.read_bytes(), kind
    except OSError as error:
        why = str(error)
    raise StackError("E-ROWS", f"{path} cannot be sent", why=why, fix="make predict FILE=examples/rows.csv")


if __name__ == "__main__":
    run_main(main)
