"""Before make dag-test: refuses a DAG that the scheduler would run as well.

A test run is a row in the metadata database like any other. Of a DAG that is not paused, the scheduler
would send its tasks to the worker, in turn with the process that tests it.

Changes nothing. Exit: 0 the DAG is paused, or not known yet; 3 it is not paused, or there is no stack.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import connect, instance
from stack.errors import StackError, run_main


def main(argv: Sequence[str]) -> int:
    """Looks whether the DAG is paused."""
    parser = argparse.ArgumentParser(prog="make dag-test", description=__doc__)
    parser.add_argument("dag", metavar="DAG=…")
    arguments = parser.parse_args(argv)
    airflow, _ = connect.airflow(instance.current())
    with airflow:
        path = f"/dags/{arguments.dag}"
        if airflow.has(f"/api/v2{path}") and not airflow.call("GET", path)["is_paused"]:
            raise StackError(
                "E-DAG-LIVE",
                f"{arguments.dag} is not paused",
                why="the scheduler would run the test's tasks in the worker, beside the process that tests them",
                fix=f'make airflow ARGS="dags pause {arguments.dag}", then again; `dags unpause` afterwards',
            )
    return 0


if __name__ == "__main__":
    run_main(main)
