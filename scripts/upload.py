"""make upload FILE=mine.csv: puts a file into the bucket `pipelines`, where the training pipeline's `source` is read.

Changes: the object KEY (by default the file's name), which is replaced where there is one. Exit: 0 done, 1 the store
did not take it, 3 no stack, or no file that can be read, 4 not done in time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from stack import instance, settings
from stack.compose import Compose
from stack.console import Step
from stack.errors import Exit, StackError, run_main
from stack.process import OUT_OF_TIME, capture

PATIENCE_S = 3600
"""Of any file; 17 MB took two seconds, most of them the container's start."""
LONGEST_KEY = 1024
"""Bytes of a key in UTF-8 that S3 takes."""


def main(argv: Sequence[str]) -> int:
    """Uploads the file."""
    parser = argparse.ArgumentParser(prog="make upload", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE=…")
    parser.add_argument("--key", default="", metavar="KEY=…", help="the object's name; the file's by default")
    arguments = parser.parse_args(argv)
    here = instance.current()
    chosen = settings.load(here.settings_file)
    compose = Compose(here)
    compose.container("minio")
    key = arguments.key.strip("/") or arguments.file.name
    if len(key.encode()) > LONGEST_KEY:
        raise refusal(arguments.file, f"its key would have {len(key.encode())} bytes, S3 takes {LONGEST_KEY}")
    try:
        with arguments.file.open("rb") as file, Step(f"uploading {arguments.file}"):
            # A container of its own: the worker's memory is for tasks.
            size = str(os.fstat(file.fileno()).st_size)
            command = compose.command("run", "--rm", "-T", "--no-deps", "airflow-cli", "bucket-put", key, size)
            told = capture(command, timeout=PATIENCE_S, check=False, stdin=file, env=compose.variables)
    except OSError as error:
        raise refusal(arguments.file, str(error)) from error
    if told.code:
        raise StackError(
            "E-UPLOAD",
            f"{arguments.file} is not in the store",
            why=told.err.strip()[-500:] or f"exit code {told.code}",
            fix="make status; then the same command again",
            changed="the object is as it was",
            exit_code=Exit.TIMED_OUT if told.code == OUT_OF_TIME else Exit.FAILED,
        )
    print(f"{'replaced' if 'replaced' in told.out else 'uploaded'}  s3://pipelines/{key}")
    print(f"once      {chosen.airflow_url}/dags/train_model: Trigger, with {key} as `source`")
    print(f"always    make airflow ARGS=\"variables set train_model_source '{key}'\"")
    return Exit.DONE


def refusal(file: Path, why: str) -> StackError:
    """A file that cannot be sent."""
    return StackError("E-UPLOAD", f"{file} cannot be sent", why=why, fix="make upload FILE=mine.csv KEY=inbox/mine.csv")


if __name__ == "__main__":
    run_main(main)
