"""make doctor: what went wrong in the last day, why, and what to do about it.

Reads the records of the kernel, the engine, Celery and Airflow; changes nothing. `--hours` looks
further back, `--json` is for machines. Exit: 0 nothing found, 1 something was, 3 no stack or no
engine that answers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from stack import connect, doctor, instance
from stack.compose import Compose
from stack.console import Step, say
from stack.errors import StackError, run_main


def main(argv: Sequence[str]) -> int:
    """Prints the findings."""
    parser = argparse.ArgumentParser(prog="make doctor", description=__doc__)
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    here = instance.current()
    stack = Compose(here)
    with Step("reading the records"):
        evidence = _gather(here, stack, arguments.hours)
    findings = doctor.diagnose(evidence)
    if arguments.json:
        print(json.dumps({"findings": [asdict(one) for one in findings], "unread": evidence.unread}))
    else:
        for one in findings:
            times = f" ({one.count} times, the last one)" if one.count > 1 else ""
            at = datetime.fromtimestamp(one.at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
            print(f"{at}  {one.where}: {one.what}{times}\n  why: {one.why}\n  fix: {one.fix}\n")
        for missing in evidence.unread:
            say(f"not read: {missing}")
        print(f"{len(findings)} finding(s)" if findings else "nothing found")
    return 1 if findings else 0


def _gather(here: instance.Instance, stack: Compose, hours: float) -> doctor.Evidence:
    since = time.time() - hours * 3600
    try:
        airflow, _ = connect.airflow(here)
    except StackError as error:
        return doctor.gather(stack, error, since)
    with airflow:
        return doctor.gather(stack, airflow, since)


if __name__ == "__main__":
    run_main(main)
