"""`make dag-lint`: what it says of the shipped DAGs, and of each thing that can be wrong with one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import Run, StackUnderTest, run

GOOD = """
from datetime import timedelta
from airflow.sdk import dag, task

@dag(dagrun_timeout=timedelta(minutes=5), default_args={"retries": 1, "execution_timeout": timedelta(minutes=1)})
def good():
    @task
    def work(x):
        import pandas
    work.expand(x=[1, 2])

good()
"""

BAD = {
    "import": (GOOD.replace("airflow.sdk", "airflow.sdx"), 3, "error"),
    "import: deep": ("import json\njson.loads('[')\n" + GOOD, 2, "error"),
    "heavy": ("import sklearn.ensemble\n" + GOOD, 1, "warning"),
    "slow": ("import time\nwhile time.process_time() < 2: pass\n" + GOOD, 1, "warning"),
    "slow: waits": ("import time\ntime.sleep(6)\n" + GOOD, 1, "warning"),
    "network": (
        "import socket\nwith __import__('contextlib').suppress(OSError):\n"
        "    socket.create_connection(('127.0.0.1', 9), 1)\n" + GOOD,
        3,
        "warning",
    ),
    "network: libpq": (
        "import psycopg2\nwith __import__('contextlib').suppress(psycopg2.Error):\n"
        "    psycopg2.connect('host=127.0.0.1 port=9 connect_timeout=1')\n" + GOOD,
        3,
        "warning",
    ),
    "network: variable": ("from airflow.sdk import Variable\nVariable.get('x', default=1)\n" + GOOD, 2, "warning"),
    "network: old variable": (
        "from airflow.models import Variable\nwith __import__('contextlib').suppress(Exception):\n"
        "    Variable.get('x')\n" + GOOD,
        3,
        "warning",
    ),
    "network: hook": (
        "from airflow.sdk import BaseHook\nwith __import__('contextlib').suppress(Exception):\n"
        "    BaseHook.get_connection('x')\n" + GOOD,
        3,
        "warning",
    ),
    "process": ("import subprocess\nsubprocess.run(['true'])\n" + GOOD, 2, "warning"),
    "retries": (GOOD.replace('"retries": 1', '"retries": 0'), 10, "warning"),
    "retries: one task": (GOOD.replace("    @task\n", "    @task(retries=0)\n"), 10, "warning"),
    "retries: an operator": (
        "from airflow.providers.standard.operators.bash import BashOperator\n"
        + GOOD.replace("\ngood()", "    BashOperator(\n        task_id='b', bash_command='', retries=0)\n\ngood()"),
        12,
        "warning",
    ),
    "timeout": (GOOD.replace("dagrun_timeout=timedelta(minutes=5), ", ""), 12, "warning"),
    "timeout: tasks": (GOOD.replace(', "execution_timeout": timedelta(minutes=1)', ""), 10, "warning"),
}


def lint(stack: StackUnderTest, folder: Path, *words: str) -> Run:
    """In the image of the DAG processor, without a network or a database."""
    folder.chmod(0o755)
    image = stack.inspect("airflow-dag-processor")["Config"]["Image"]
    mount = f"{folder}:/opt/airflow/dags:ro"
    return run("docker", "run", "--rm", "--network", "none", "-v", mount, image, "dag-lint", *words, timeout=300)


@pytest.mark.shipped
def test_the_shipped_dags_are_clean(stack: StackUnderTest) -> None:
    told = stack.make("dag-lint", "ARGS=--strict")
    assert told.code == 0, told.output
    assert "2 files, 2 DAGs: 0 errors, 0 warnings" in told.output


def file_name(case: str) -> str:
    return re.sub(r"\W+", "_", case) + ".py"


@pytest.fixture(scope="module")
def report(stack: StackUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of a folder with a file for each fault, and a good one."""
    folder = tmp_path_factory.mktemp("faulty")
    for case, (text, _, _) in BAD.items():
        (folder / file_name(case)).write_text(text)
    (folder / "good.py").write_text(GOOD)
    return lint(stack, folder)


@pytest.mark.parametrize("case", BAD)
def test_each_fault_is_named_with_its_line(report: Run, case: str) -> None:
    _, line, level = BAD[case]
    assert f"{file_name(case)}:{line}: {level} [{case.partition(':')[0]}]" in report.output, report.output
    assert "good.py:" not in report.output, report.output
    assert report.code == 1


def test_a_warning_counts_when_it_is_asked_for(stack: StackUnderTest, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(BAD["timeout"][0])
    assert lint(stack, tmp_path).code == 0
    assert lint(stack, tmp_path, "--strict").code == 1


def test_a_file_that_ends_its_process_does_not_end_the_report(stack: StackUnderTest, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("# airflow dag\nimport os\nos.kill(os.getpid(), 9)\n")
    (tmp_path / "good.py").write_text(GOOD)
    told = lint(stack, tmp_path)
    assert "ends.py:1: error [import] reading it ended its process (-9)" in told.output, told.output
    assert "2 files, 1 DAGs: 1 errors" in told.output
    assert lint(stack, tmp_path, "missing.py").code == 1
