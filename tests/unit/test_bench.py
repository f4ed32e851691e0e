"""What the benchmark makes of its samples: no ratio of different work, none of what failed, and each failure told."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from bench import report, run, systems
from bench.report import Measured
from bench.run import WORKLOADS, Bench, about
from bench.workloads import Sample
from stack.errors import StackError
from stack.instance import ROOT

FACTS = about(1, {})


def samples(*values: float, work: str = "same") -> list[Sample]:
    return [Sample(value, work) for value in values]


@pytest.fixture
def bench() -> Bench:
    return Bench(quick=False, only={"fan_out", "edits", "up_2GB", "memory_after"})


def test_a_ratio_is_that_of_the_medians() -> None:
    found = Measured(samples(1, 2, 30), samples(8, 4, 4), samples(1, 1, 1))
    assert (found.ratio(), found.ratio("floor")) == (0.5, 2)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Measured(samples(1), samples(2, work="other")), "different work"),
        (Measured(samples(1), []), "only ours was measured"),
        (Measured(samples(1, 1), samples(2)), "not as often"),
        (Measured(samples(1, 1), samples(2), [], ["peer failed: it did"]), "peer failed: it did"),
    ],
)
def test_there_is_none_of_different_work_or_of_what_failed(found: Measured, said: str, tmp_path: Path) -> None:
    assert found.ratio() is None
    assert said in found.remarks()[0]
    assert " none " in report.table({"fan_out": WORKLOADS["fan_out"]}, {"fan_out": found}).splitlines()[1]
    report.to_json(FACTS, WORKLOADS, {"fan_out": found}, tmp_path / "deep/found.json")
    told = json.loads((tmp_path / "deep/found.json").read_text())["workloads"]["fan_out"]
    assert (told["ratio"], told["judged"]) == (None, None)
    assert told["ours"]["median"] == 1


@pytest.mark.parametrize(("problem", "judged"), [("peer failed: it did", 1), ("ours failed: it did", None)])
def test_what_stands_alone_is_not_judged_where_ours_failed(problem: str, judged: float | None) -> None:
    found = Measured(samples(1), [], [], [problem])
    assert found.judged(WORKLOADS["load_memory"]) == judged


def test_the_picture_says_what_failed_and_where_it_was() -> None:
    found = {"fan_out": Measured(samples(1), samples(2), [], ["peer failed: <it>"]), "chain": Measured()}
    drawn = report.picture(FACTS, WORKLOADS, found)
    for told in ("peer failed: &lt;it&gt;", "not run", str(FACTS["date"]), f"commit {FACTS['commit']}"):
        assert told in drawn


def test_a_side_that_failed_lacks_what_it_has_not_measured(bench: Bench) -> None:
    """Of the round, not of the ones before; MLflow is measured with ours, and some are measured once."""
    bench.measured["fan_out"].ours = samples(1, 1)
    bench.measured["edits"].ours = bench.measured["edits"].peer = samples(1)
    bench._lacks("peer failed", 1, bench.peer)
    assert not bench.measured["up_2GB"].problems
    bench._lacks("ours failed", 1, bench.ours)
    found = {name: one.problems for name, one in bench.measured.items()}
    assert found["fan_out"] == ["peer failed"]
    assert found["edits"] == []
    assert found["up_2GB"] == ["ours failed"]
    # Ours was measured, the peer's MLflow not.
    bench.measured["up_2GB"].ours = samples(1, 1, 1)
    bench._lacks("ours failed again", 2, bench.ours)
    assert bench.measured["up_2GB"].problems == ["ours failed", "ours failed again"]


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the name that a benchmark has now.
    monkeypatch.setattr(systems, "OURS", f"test-{os.getpid()}")
    with systems.only_one(), pytest.raises(StackError, match="another"), systems.only_one():
        pass
    with systems.only_one():
        pass


def test_what_is_hidden_from_the_peer_is_where_the_images_have_it() -> None:
    """Docker makes a path that is not there, and the peer would run with our plugins."""
    for image, folder in (("airflow", "."), ("mlflow", "plugin")):
        peer = (ROOT / "bench/peer" / f"{image}.yaml").read_text(encoding="utf-8")
        ((packages, name),) = re.findall(r"(/opt/venv/lib/\S+/site-packages)/([\w.-]+\.dist-info)", peer)
        assert (ROOT / "dockerfiles" / image / folder / name / "entry_points.txt").is_file()
        assert packages in (ROOT / "dockerfiles" / image / "Dockerfile").read_text(encoding="utf-8")


def test_memory_after_is_after_something(bench: Bench) -> None:
    assert {"trigger_to_start", "chain", "fan_out"} <= bench.measured.keys()
    assert set(run.RATES) <= Bench(quick=False, only={"mlflow_memory"}).measured.keys()


def test_the_peers_memory_has_its_mlflow_of_the_same_round(bench: Bench) -> None:
    bench._peer_mlflow_idle = [1]
    # Left out is not failed.
    assert bench.results()["memory_after"].problems == []
    bench.measured["memory_after"].ours = samples(1, 1)
    bench.measured["memory_after"].peer = samples(10, 20)
    bench._peer_mlflow_idle = [1]
    assert bench.results()["memory_after"].ratio() is None
    bench._peer_mlflow_idle = [1, 2]
    for _ in range(2):
        assert [one.value for one in bench.results()["memory_after"].peer] == [11, 22]
