"""Each gate of the shipped pipeline, closed: nothing behind it ran, and the champion is who it was."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from stack.airflow import Airflow
from stack.errors import StackError
from tests.e2e.conftest import AUTOMATIC, DAG_ID, MODEL, PATIENCE_S, password_in, run_in
from tests.support import StackUnderTest, wait_until

APPROVAL_S = 180
ORDER = ("ingest", "validate", "features", "train", "evaluate", "choose", "register", "approve", "promote")
HEADER = "mean radius,mean texture,mean perimeter,mean area,mean smoothness,mean concavity,target\n"


@pytest.fixture
def champion(tracking: MlflowClient, finished: dict[str, Any]) -> Callable[[], str]:
    """Who is champion now; there is one."""
    assert finished["version"]
    return lambda: str(tracking.get_model_version_by_alias(MODEL, "champion").version)


def states(airflow: Airflow, run_id: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in airflow.task_instances(DAG_ID, run_id):
        found.setdefault(one["task_id"], set()).add(str(one["state"]))
    return found


def closed_at(airflow: Airflow, run_id: str, gate: str) -> None:
    """All before it succeeded, and it failed at its first attempt; nothing behind it ran."""
    found = states(airflow, run_id)
    place = ORDER.index(gate)
    assert {name: found[name] for name in ORDER[:place]} == {name: {"success"} for name in ORDER[:place]}
    tries = [one["try_number"] for one in airflow.task_instances(DAG_ID, run_id) if one["task_id"] == gate]
    assert (found[gate], tries) == ({"failed"}, [1])
    behind = (*ORDER[place + 1 :], "smoke_test", "announce")
    assert {name: found[name] for name in behind} == {name: {"upstream_failed"} for name in behind}


def test_damaged_data(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, champion: Callable[[], str]
) -> None:
    """Validation fails at once, `make demo` says why, and nothing is trained."""
    before = champion()
    said = stack.make("demo", "ARGS=--damage-data")
    assert said.code != 0, said.output
    run_id = run_in(said.output)
    closed_at(airflow, run_id, "validate")
    assert re.search("^validate failed: .*25 values outside 5 to 40", said.output, re.MULTILINE), said.output
    experiment = tracking.get_experiment_by_name(DAG_ID)
    assert experiment is not None
    query = f"tags.`airflow.run_id` = '{run_id}'"
    assert not tracking.search_runs([experiment.experiment_id], filter_string=query)
    assert champion() == before


@pytest.mark.parametrize(
    ("name", "content", "gate", "seen"),
    [
        ("no.csv", None, "ingest", "there is no s3://pipelines/inbox/no.csv"),
        ("empty.csv", b"", "ingest", "is not a table"),
        ("picture.parquet", b"\x89PNG and so on", "ingest", "it is no Parquet file"),
        ("cut.parquet", b"PAR1" + b"\0" * 8 + b"\xff\0\0\0PAR1", "ingest", "or not all of one"),
        (
            "short.csv",
            (HEADER + "14,20,90,600,0.1,0.1,1\n" * 10).encode(),
            "validate",
            "1 different rows, at least 200",
        ),
        ("copies.csv", (HEADER + "14,20,90,600,0.1,0.1,1\n" * 300).encode(), "validate", "1 different rows"),
        ("holes.csv", (HEADER + "14,20,90,600,0.1,0.1,\n" * 300).encode(), "validate", "target: 0 and 1, each"),
        ("words.csv", (HEADER + "big,20,90,600,0.1,0.1,1\n" * 300).encode(), "validate", "mean radius: not numeric"),
        ("other.csv", b"a,b\n1,2\n" * 300, "validate", "columns missing: mean radius"),
        (
            "gaps.csv",
            (HEADER + ",20,90,600,0.1,0.1,1\n" * 300).encode(),
            "validate",
            "mean radius: 1 empty values; mean radius: always the same value",
        ),
        ("large.csv", 2 * 10**9, "ingest", "2,000,000,000 bytes, at most 20,000,000"),
        ("long.csv", b"a,b\n" + b"1,2\n" * 1_000_000, "ingest", "2,000,002 values, at most 2,000,000"),
    ],
)
def test_a_table_of_ones_own_that_is_none(
    stack: StackUnderTest,
    airflow: Airflow,
    champion: Callable[[], str],
    name: str,
    content: bytes | int | None,
    gate: str,
    seen: str,
) -> None:
    """Missing, empty, no table, too short, not numbers, other columns, too large: told, and nothing is trained."""
    before, key = champion(), f"inbox/{name}"
    store = stack.s3("pipelines")
    if isinstance(content, bytes):
        store.put_object(Bucket="pipelines", Key=key, Body=content)
    elif content:
        with tempfile.TemporaryFile() as file:
            # So many bytes, which take no space here.
            file.truncate(content)
            store.upload_fileobj(file, "pipelines", key)
    try:
        run_id = airflow.trigger(DAG_ID, AUTOMATIC | {"source": key})
        assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
    finally:
        store.delete_object(Bucket="pipelines", Key=key)
    closed_at(airflow, run_id, gate)
    assert seen in airflow.task_log(DAG_ID, run_id, gate)
    assert champion() == before


AS_PARQUET = """
import base64, io, sys
import pandas as pd

class Kept(io.BytesIO):
    def close(self):
        pass

rows, many = Kept(), Kept()
pd.read_csv(io.BytesIO(base64.b64decode("RAW"))).to_parquet(rows, index=False)
pd.DataFrame({"a": [1.5] * 1_000_001, "b": 2.5}).to_parquet(many, index=False, compression="gzip")
print("PARQUET", *(base64.b64encode(one.getvalue()).decode() for one in (rows, many)))
"""


def test_a_table_of_ones_own(
    stack: StackUnderTest, airflow: Airflow, finished: dict[str, Any], champion: Callable[[], str]
) -> None:
    """The example's rows as the user's own: the same models come of them. As CSV it is named in the run; as Parquet by
    the variable, as for a run that nobody starts, in a run whose threshold the best of the three misses: it is not
    registered. Where the file is gone when the first one is cleared, its model stays champion. A Parquet file whose
    few bytes are many values is refused."""
    store = stack.s3("pipelines")
    raw = store.get_object(Bucket="pipelines", Key=f"{DAG_ID}/{finished['run_id']}/raw.csv")["Body"].read()
    made = stack.python("airflow-worker", AS_PARQUET.replace("RAW", base64.b64encode(raw).decode()))
    assert made.code == 0, made.output
    rows, many = (base64.b64decode(one) for one in made.output.partition("PARQUET ")[2].split())
    for name, content in (("mine.csv", raw), ("mine.parquet", rows), ("many.parquet", many)):
        (stack.clone / name).write_bytes(content)
        store.delete_object(Bucket="pipelines", Key=f"inbox/{name}")
        for word in ("uploaded", "replaced"):
            said = stack.make("upload", f"FILE={name}", f"KEY=inbox/{name}")
            assert said.code == 0, said.output
            assert f"{word}  s3://pipelines/inbox/{name}" in said.output
        (stack.clone / name).unlink()

    def play(parameters: dict[str, Any]) -> tuple[str, str]:
        run_id = airflow.trigger(DAG_ID, AUTOMATIC | parameters)
        return airflow.follow(DAG_ID, run_id, patience=PATIENCE_S), run_id

    state, run_id = play({"source": "inbox/many.parquet"})
    assert state == "failed"
    assert "2,000,002 values, at most 2,000,000" in airflow.task_log(DAG_ID, run_id, "ingest")

    state, run_id = play({"source": "inbox/mine.csv"})
    assert state == "success"
    best = airflow.xcom(DAG_ID, run_id, "promote")
    assert best["source"] == "s3://pipelines/inbox/mine.csv"
    assert best["metrics"]["roc_auc"] == pytest.approx(finished["metrics"]["roc_auc"])

    before = champion()
    assert before == best["version"]
    store.delete_object(Bucket="pipelines", Key="inbox/mine.csv")
    clear(airflow, run_id, "ingest")
    assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
    found = states(airflow, run_id)
    assert (found["ingest"], found["promote"], found["restore"]) == ({"failed"}, {"upstream_failed"}, {"skipped"})
    assert champion() == before

    airflow.call("POST", "/variables", json={"key": "train_model_source", "value": "inbox/mine.parquet"})
    try:
        state, run_id = play({"min_roc_auc": 1})
    finally:
        airflow.call("DELETE", "/variables/train_model_source")
    assert state == "failed"
    closed_at(airflow, run_id, "choose")
    assert airflow.xcom(DAG_ID, run_id, "ingest")["source"] == "s3://pipelines/inbox/mine.parquet"
    told = airflow.task_log(DAG_ID, run_id, "choose")
    score = f"{best['cv_roc_auc']:.4f} in cross-validation, roc_auc {best['metrics']['roc_auc']:.4f}"
    assert f"1. {best['name']}: {score}" in told
    assert "is not good enough" in told
    assert champion() == before


def test_a_file_that_cannot_be_uploaded(stack: StackUnderTest) -> None:
    """Missing, a folder, none named, a name that is too long for a key: told, and nothing is sent."""
    for words in (["FILE=none.csv"], ["FILE=dags"], [], ["FILE=README.md", f"KEY={'x' * 1025}"]):
        refused = stack.make("upload", *words)
        assert refused.code != 0
        assert "E-UPLOAD" in refused.output, refused.output


def test_a_file_that_breaks_off_is_not_put(stack: StackUnderTest) -> None:
    """Its sender was ended: the object that was there stays, whole, and no part of the new one."""
    store, key = stack.s3("pipelines"), "inbox/half.csv"
    store.put_object(Bucket="pipelines", Key=key, Body=b"whole")
    words = ("run", "--rm", "-T", "--no-deps", "airflow-cli", "bucket-put", key)
    # One that goes at once, and one that goes in parts.
    sent = [b"12345", os.urandom(20 * 10**6)]
    try:
        for content, lacks in ((sent[0], 5), (sent[1], 10**7), (sent[0], 0)):
            command = stack.compose.command(*words, str(len(content) + lacks))
            said = subprocess.run(
                command, input=content, env=os.environ | stack.compose.variables, capture_output=True, check=False
            )
            assert said.returncode == (1 if lacks else 0), said
            assert (f"the last {lacks} bytes did not come".encode() in said.stderr) == bool(lacks)
            body = store.get_object(Bucket="pipelines", Key=key)["Body"].read()
            assert body == (b"whole" if lacks else content)
            assert not store.list_multipart_uploads(Bucket="pipelines", Prefix=key).get("Uploads")
    finally:
        store.delete_object(Bucket="pipelines", Key=key)


KNOWS_ALL = f"""
import mlflow
from mlflow.models import infer_signature
from sklearn.datasets import load_breast_cancer
from sklearn.neighbors import KNeighborsClassifier

columns = {HEADER.strip().split(",")[:-1]!r}
rows, target = load_breast_cancer(as_frame=True, return_X_y=True)
rows = rows[columns]
model = KNeighborsClassifier(1, algorithm="brute").fit(rows, target)
mlflow.set_experiment("{DAG_ID}")
with mlflow.start_run(run_name="knows-all"):
    made = mlflow.sklearn.log_model(model, name="model", signature=infer_signature(rows, model.predict(rows)))
version = mlflow.register_model(made.model_uri, "{MODEL}").version
mlflow.MlflowClient().set_registered_model_alias("{MODEL}", "champion", version)
print("version", version)
"""


def test_worse_than_the_champion(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, champion: Callable[[], str]
) -> None:
    """A champion that has every row by heart is not replaced by one that is good enough otherwise, whatever parameters
    it has; but where this DAG trained it, and says of no split, or of another, that it did so."""
    before = champion()
    made = stack.python("airflow-worker", KNOWS_ALL)
    assert made.code == 0, made.output
    try:
        better = champion()
        assert f"version {better}" in made.output.splitlines()
        trained = tracking.get_model_version(MODEL, better).run_id
        tracking.log_param(trained, "data", "a person's")
        run_id = airflow.trigger(DAG_ID, AUTOMATIC)
        assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
        closed_at(airflow, run_id, "choose")
        assert "is not good enough" in airflow.task_log(DAG_ID, run_id, "choose")
        assert champion() == better

        tracking.set_tag(trained, "airflow.dag_id", DAG_ID)
        clear(airflow, run_id, "choose")
        assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "success"
        assert "trained on rows of another split" in airflow.task_log(DAG_ID, run_id, "choose", attempt=2)
        assert airflow.xcom(DAG_ID, run_id, "choose")["not_compared"] == better
        assert champion() == airflow.xcom(DAG_ID, run_id, "register")["version"]
    finally:
        tracking.set_registered_model_alias(MODEL, "champion", before)


def wait_until_asked(airflow: Airflow, run_id: str) -> dict[str, Any]:
    """Returns what the run asks a person, once it does."""

    def asks() -> bool:
        found = states(airflow, run_id)
        assert "failed" not in set().union(*found.values()), found
        return found.get("approve") == {"awaiting_input"}

    wait_until(asks, PATIENCE_S, "the run asks for approval")
    asked: dict[str, Any] = airflow.call("GET", question(run_id))
    return asked


def question(run_id: str) -> str:
    return f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances/approve/-1/hitlDetails"


def answer(airflow: Airflow, run_id: str, option: str) -> None:
    """Waits until the run asks, and answers."""
    wait_until_asked(airflow, run_id)
    airflow.call("PATCH", question(run_id), json={"chosen_options": [option]})


def test_an_approval_that_is_given(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, champion: Callable[[], str], username: str
) -> None:
    """Within three minutes a person is asked, with what there is to know; until then `make demo` starts no other run.
    Not everybody may answer. The challenger becomes champion, and there is no challenger any more."""
    began = time.monotonic()
    run_id = airflow.trigger(DAG_ID)
    asked = wait_until_asked(airflow, run_id)
    took = time.monotonic() - began
    stack.timings["the pipeline, from trigger to approval"] = took
    assert took < APPROVAL_S
    made = airflow.xcom(DAG_ID, run_id, "register")
    for told in (made["name"], f"version {made['version']}", "trained on the example's data", made["url"]):
        assert told in asked["body"], asked
    refused = stack.make("demo")
    assert refused.code != 0
    assert "E-RUN-WAITS" in refused.output
    assert run_id in refused.output
    viewer = Airflow(
        stack.airflow_url, username, password_in(stack.make("user", f"NAME={username}", "ROLE=viewer").output)
    )
    with viewer, pytest.raises(StackError, match="403"):
        answer(viewer, run_id, "Approve")
    assert states(airflow, run_id)["approve"] == {"awaiting_input"}
    answer(airflow, run_id, "Approve")
    assert airflow.follow(DAG_ID, run_id, patience=120) == "success"
    assert champion() == airflow.xcom(DAG_ID, run_id, "register")["version"]
    assert "challenger" not in tracking.get_registered_model(MODEL).aliases


def clear(airflow: Airflow, run_id: str, task_id: str) -> None:
    """Clears a task and what is behind it."""
    again = {"dag_run_id": run_id, "task_ids": [task_id], "include_downstream": True, "only_failed": False}
    airflow.call("POST", f"/dags/{DAG_ID}/clearTaskInstances", json=again | {"dry_run": False})


def test_an_approval_that_never_comes_is_given_too_late_and_refused(
    airflow: Airflow, tracking: MlflowClient, champion: Callable[[], str]
) -> None:
    """The run fails where nobody answers, and says so. Cleared, it asks again, and nothing is trained again: given,
    when another has become champion, it deploys nothing; refused, neither, and the version stays a challenger, to
    be looked at. It is registered once, beside one that a person has made of the same run."""
    before = champion()
    run_id = airflow.trigger(DAG_ID, {"approval_minutes": 1})
    assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
    closed_at(airflow, run_id, "approve")
    assert "nobody answered within 1 minutes: nothing is deployed" in airflow.task_log(DAG_ID, run_id, "approve")
    assert champion() == before

    other = str(mlflow.register_model(tracking.get_model_version(MODEL, before).source, MODEL).version)
    clear(airflow, run_id, "approve")
    tracking.set_registered_model_alias(MODEL, "champion", other)
    try:
        answer(airflow, run_id, "Approve")
        assert airflow.follow(DAG_ID, run_id, patience=60) == "failed"
        assert states(airflow, run_id)["restore"] == {"skipped"}
        assert f"version {other} has become champion since" in airflow.task_log(DAG_ID, run_id, "promote")
        assert champion() == other
    finally:
        tracking.set_registered_model_alias(MODEL, "champion", before)
        tracking.delete_model_version(MODEL, other)

    made = airflow.xcom(DAG_ID, run_id, "register")
    by_hand = str(mlflow.register_model(made["model_uri"], MODEL).version)
    try:
        clear(airflow, run_id, "register")
        answer(airflow, run_id, "Reject")
        assert airflow.follow(DAG_ID, run_id, patience=60) == "success"
        assert tracking.get_model_version(MODEL, by_hand).run_id == made["run_id"]
    finally:
        tracking.delete_model_version(MODEL, by_hand)
    found = states(airflow, run_id)
    behind = ("promote", "smoke_test", "announce", "restore")
    assert {name: found[name] for name in behind} == {name: {"skipped"} for name in behind}
    tries = {(one["task_id"], one["try_number"]) for one in airflow.task_instances(DAG_ID, run_id)}
    assert {("train", 1), ("register", 2), ("approve", 3)} <= tries
    assert ("train", 2) not in tries
    assert champion() == before
    assert airflow.xcom(DAG_ID, run_id, "register")["version"] == made["version"]
    assert tracking.get_model_version_by_alias(MODEL, "challenger").version == made["version"]


def test_a_smoke_test_that_fails(airflow: Airflow, champion: Callable[[], str]) -> None:
    """The alias goes back to the version that had it, and the run fails."""
    before = champion()
    run_id = airflow.trigger(DAG_ID, AUTOMATIC | {"fail_smoke_test": True})
    assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
    found = states(airflow, run_id)
    assert found["promote"] == {"success"}
    assert found["smoke_test"] == found["restore"] == {"failed"}
    assert found["announce"] == {"upstream_failed"}
    assert f"champion is version {before} again" in airflow.task_log(DAG_ID, run_id, "restore")
    assert champion() == before


def test_the_first_champion_answers_otherwise(
    stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, champion: Callable[[], str]
) -> None:
    """It is served, and does not answer as it was evaluated: the rows are others by then. Nobody is champion again; nor
    where the one whose place it took has been deleted since."""
    before = champion()
    tracking.delete_registered_model_alias(MODEL, "champion")
    try:
        run_id = airflow.trigger(DAG_ID)
        wait_until_asked(airflow, run_id)
        store, key = stack.s3("pipelines"), f"{DAG_ID}/{run_id}/test.csv"
        header, *rows = store.get_object(Bucket="pipelines", Key=key)["Body"].read().splitlines()
        store.put_object(Bucket="pipelines", Key=key, Body=b"\n".join([header, *sorted(rows)]))
        answer(airflow, run_id, "Approve")
        assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
        found = states(airflow, run_id)
        assert (found["promote"], found["smoke_test"], found["restore"]) == ({"success"}, {"failed"}, {"failed"})
        assert "does not answer as it did in its evaluation" in airflow.task_log(DAG_ID, run_id, "smoke_test")
        assert "champion is nobody again" in airflow.task_log(DAG_ID, run_id, "restore")
        assert "champion" not in tracking.get_registered_model(MODEL).aliases

        version = airflow.xcom(DAG_ID, run_id, "register")["version"]
        tracking.set_model_version_tag(MODEL, version, "previous_champion", "9999")
        tracking.set_registered_model_alias(MODEL, "champion", version)
        clear(airflow, run_id, "smoke_test")
        assert airflow.follow(DAG_ID, run_id, patience=PATIENCE_S) == "failed"
        told = airflow.task_log(DAG_ID, run_id, "restore", attempt=2)
        assert "version 9999 has been deleted since" in told
        assert "champion is nobody again" in told
        assert "champion" not in tracking.get_registered_model(MODEL).aliases
    finally:
        tracking.set_registered_model_alias(MODEL, "champion", before)
