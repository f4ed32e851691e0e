"""The served model: what it answers and refuses, that it follows the alias, and what it may do elsewhere."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from mlflow import MlflowClient

from tests.e2e.models import Made, champion, make, put_back, ready
from tests.support import StackUnderTest, run, wait_until

FOLLOWS_S = 10
REQUESTS = 10_000
CLIENTS = 8
SLOWEST_S = 0.5
"""For the slowest in a hundred of eight clients without a pause, on one busy machine with them."""
AIM_S, ROUNDS = 0.05, 4
"""For the slowest in a hundred at fifty a second: in one of some rounds, for the machine has other work, too."""
FLUSHED_S = 30
ROW = {
    "mean radius": 17.99,
    "mean texture": 10.38,
    "mean perimeter": 122.8,
    "mean area": 1001.0,
    "mean smoothness": 0.1184,
    "mean concavity": 0.3001,
}


@pytest.fixture(scope="module")
def two(stack: StackUnderTest, tracking: MlflowClient) -> Iterator[list[Made]]:
    """Two versions that can answer; the first is champion. Afterwards the alias is where it was."""
    before = champion(tracking, stack.settings.serving_model)
    made = [make(stack), make(stack)]
    made[0].promote(tracking)
    try:
        # The first load of all brings the libraries into memory as well.
        wait_until(lambda: ready(stack).get("version") == made[0].version, 3 * FOLLOWS_S, "the first version answers")
        yield made
    finally:
        put_back(tracking, stack.settings.serving_model, before)


@pytest.fixture(scope="module")
def http(stack: StackUnderTest) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {stack.secret('serving_token')}"}
    with httpx.Client(base_url=stack.settings.serving_url, headers=headers, timeout=30) as client:
        yield client


def ask(http: httpx.Client, *rows: dict[str, Any]) -> httpx.Response:
    return http.post("/invocations", json={"dataframe_records": list(rows)})


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_prediction(http: httpx.Client, two: list[Made]) -> None:
    """As JSON in each form of the protocol and as CSV; the answer says who gave it."""
    names, values = list(ROW), list(ROW.values())
    bodies = [
        {"dataframe_records": [ROW]},
        {"dataframe_split": {"columns": names, "data": [values]}},
        {"instances": [ROW]},
        {"inputs": {name: [value] for name, value in ROW.items()}},
    ]
    answers = [http.post("/invocations", json=body) for body in bodies]
    lines = f"{','.join(names)}\n{','.join(map(str, values))}\n"
    answers.append(http.post("/invocations", content=lines, headers={"Content-Type": "text/csv"}))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"predictions": [0], "model": two[0].name, "version": two[0].version}
        assert answer.headers["x-model-version"] == two[0].version
    assert ask(http, *[ROW] * 100).json()["predictions"] == [0] * 100


@pytest.mark.usefixtures("two")
def test_each_refusal(http: httpx.Client) -> None:
    """400, 413, 415 and 422, each with a code and a reason that names the columns."""

    def post(content: bytes | str, kind: str = "application/json") -> httpx.Response:
        return http.post("/invocations", content=content, headers={"Content-Type": kind})

    lacking = {name: value for name, value in ROW.items() if name != "mean area"}
    answers = [
        (400, post("{"), "JSON"),
        (400, post("{}"), "dataframe_split"),
        (413, post(b" " * (6 << 20)), "5 MB"),
        (415, post("<a/>", "application/xml"), "application/json"),
        (422, ask(http, lacking), "columns missing: mean area"),
        (422, ask(http, ROW | {"mean radius": "wide"}), "mean radius: double expected"),
        (422, ask(http, ROW | {"target": 1}), "does not have: target"),
        (422, ask(http, ROW | {"mean radius": None}), "NaN"),
    ]
    for status, answer, told in answers:
        assert answer.status_code == status, answer.text
        assert set(answer.json()) == {"error", "message"}
        assert told in answer.json()["message"], answer.text
    assert ask(http, ROW).status_code == 200


def test_the_schema(http: httpx.Client, two: list[Made]) -> None:
    told = http.get("/schema").json()
    assert (told["model"], told["version"], told["run_id"]) == (two[0].name, two[0].version, two[0].run_id)
    assert {(one["name"], one["type"], one["required"]) for one in told["inputs"]} == {
        (name, "double", True) for name in ROW
    }
    assert told["outputs"]


def test_the_metrics(http: httpx.Client, two: list[Made]) -> None:
    before = metric(http, 'serving_requests_total{status="200"}')
    refused = metric(http, 'serving_requests_total{status="422"}')
    assert ask(http, ROW).status_code == 200
    assert ask(http, {}).status_code in (400, 422)
    assert ask(http, {"mean radius": 1}).status_code == 422
    assert metric(http, 'serving_requests_total{status="200"}') == before + 1
    assert metric(http, 'serving_requests_total{status="422"}') > refused
    labels = f'model="{two[0].name}",run_id="{two[0].run_id}",version="{two[0].version}"'
    text = http.get("/metrics").text
    info = re.findall(r"^serving_model_info\{(.*)\} 1.0$", text, re.MULTILINE)
    assert [",".join(sorted(one.split(","))) for one in info] == [labels]
    for name in ("serving_request_seconds_bucket", "serving_log_queued_rows", "serving_log_dropped_rows_total"):
        assert name in text
    assert metric(http, "serving_ready") == 1


def test_it_follows_the_alias(
    stack: StackUnderTest, tracking: MlflowClient, http: httpx.Client, two: list[Made]
) -> None:
    """There and back, each within ten seconds, without a restart."""
    started = stack.inspect("serving")["State"]["StartedAt"]
    for made in (two[1], two[0]):
        made.promote(tracking)
        began = time.perf_counter()
        wait_until(lambda made=made: ask(http, ROW).json()["version"] == made.version, FOLLOWS_S, "the new version")
        stack.timings["the alias moved, until the new version answers"] = time.perf_counter() - began
    assert stack.inspect("serving")["State"]["StartedAt"] == started


def test_no_request_fails_while_the_model_changes(
    stack: StackUnderTest, tracking: MlflowClient, two: list[Made]
) -> None:
    """10,000 requests of eight clients, and two changes among them: each is answered by one version or the other."""
    headers = {"Authorization": f"Bearer {stack.secret('serving_token')}", "Content-Type": "application/json"}
    body = json.dumps({"dataframe_records": [ROW]}).encode()
    statuses: Counter[int] = Counter()
    versions: Counter[str] = Counter()
    seconds: list[float] = []
    lock = threading.Lock()

    def client(_: int) -> None:
        with httpx.Client(base_url=stack.settings.serving_url, headers=headers, timeout=30) as http:
            for _ in range(REQUESTS // CLIENTS):
                began = time.perf_counter()
                answer = http.post("/invocations", content=body)
                took = time.perf_counter() - began
                with lock:
                    statuses[answer.status_code] += 1
                    versions[answer.headers.get("x-model-version", "")] += 1
                    seconds.append(took)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        for part, made in ((REQUESTS // 4, two[1]), (REQUESTS * 5 // 8, two[0])):
            wait_until(lambda part=part: len(seconds) >= part, 300, f"{part} answers")
            made.promote(tracking)
        for one in clients:
            one.result()
    p99 = sorted(seconds)[int(0.99 * len(seconds))]
    stack.timings[f"a prediction, {CLIENTS} clients without a pause and two swaps, p99"] = p99
    assert statuses == {200: REQUESTS}
    assert set(versions) == {made.version for made in two}, versions
    assert p99 < SLOWEST_S
    wait_until(lambda: ready(stack).get("version") == two[0].version, FOLLOWS_S, "the first version again")


@pytest.mark.usefixtures("two")
def test_fifty_a_second(stack: StackUnderTest, http: httpx.Client) -> None:
    """The load that it is made for, from the moment when a request is due."""
    found: list[float] = []
    while len(found) < ROUNDS and min(found, default=AIM_S) >= AIM_S:
        seconds = []
        begin = time.perf_counter()
        for number in range(500):
            due = begin + number / 50
            time.sleep(max(0.0, due - time.perf_counter()))
            assert ask(http, ROW).status_code == 200
            seconds.append(time.perf_counter() - due)
        found.append(sorted(seconds)[int(0.99 * len(seconds))])
    stack.timings["a prediction, 50 a second, p99"] = min(found)
    assert min(found) < AIM_S, found


@pytest.mark.parametrize(("kind", "why"), [("without a signature", "signature"), ("too large", "41.0 MiB of files")])
def test_a_version_that_cannot_be_loaded_changes_nothing(
    stack: StackUnderTest, tracking: MlflowClient, http: httpx.Client, two: list[Made], kind: str, why: str
) -> None:
    """The old one answers; health, log and metrics say which version is the trouble, and why."""
    failures = metric(http, "serving_load_failures_total")
    bad = make(stack, kind)
    bad.promote(tracking)
    told = wait_until(lambda: ready(stack).get("failed"), 2 * FOLLOWS_S, "the version that failed is told")
    assert told["version"] == bad.version
    assert why in told["error"]
    assert ask(http, ROW).json()["version"] == two[0].version
    assert metric(http, "serving_load_failures_total") == failures + 1
    log = run("docker", "logs", "--tail", "200", stack.container("serving")).output
    assert f"version {bad.version} of {bad.name} cannot be loaded" in log
    two[0].promote(tracking)
    wait_until(lambda: "failed" not in ready(stack), FOLLOWS_S, "the trouble is forgotten")


def test_without_the_alias_nobody_answers(
    stack: StackUnderTest, tracking: MlflowClient, http: httpx.Client, two: list[Made]
) -> None:
    """Whoever takes it away means it. The service itself is well; with the alias the answers come back."""
    tracking.delete_registered_model_alias(two[0].name, "champion")
    wait_until(lambda: ask(http, ROW).status_code == 503, FOLLOWS_S, "no answers")
    for answer in (ask(http, ROW), http.get("/schema")):
        assert (answer.status_code, answer.json()["error"]) == (503, "NO_MODEL")
        assert "no version of" in answer.json()["message"]
    assert httpx.get(f"{stack.settings.serving_url}/health/ready").status_code == 503
    assert httpx.get(f"{stack.settings.serving_url}/health/live").status_code == 200
    said = stack.make("predict")
    assert "E-CHAMPION" in said.output, said.output
    two[0].promote(tracking)
    wait_until(lambda: ask(http, ROW).status_code == 200, FOLLOWS_S, "answers again")


def test_without_mlflow_it_goes_on(
    stack: StackUnderTest, tracking: MlflowClient, http: httpx.Client, two: list[Made]
) -> None:
    """The last model answers, health says that MLflow is away, and later it follows again."""
    mlflow = stack.container("mlflow")
    assert run("docker", "stop", mlflow).code == 0
    try:
        wait_until(lambda: "mlflow" in ready(stack), 60, "serving has noticed")
        for _ in range(20):
            assert ask(http, ROW).json()["version"] == two[0].version
        assert httpx.get(f"{stack.settings.serving_url}/health/ready").status_code == 200
    finally:
        assert run("docker", "start", mlflow).code == 0
        health = ("docker", "inspect", "--format", "{{.State.Health.Status}}", mlflow)
        wait_until(lambda: run(*health).output.strip() == "healthy", 120, "MLflow is well again")
    wait_until(lambda: "mlflow" not in ready(stack), 60, "serving has noticed")
    two[1].promote(tracking)
    wait_until(lambda: ask(http, ROW).json()["version"] == two[1].version, FOLLOWS_S, "the new version")
    two[0].promote(tracking)
    wait_until(lambda: ask(http, ROW).json()["version"] == two[0].version, FOLLOWS_S, "the first version again")


def test_predictions_are_logged(stack: StackUnderTest, http: httpx.Client, two: list[Made]) -> None:
    """Each answered row is a line of an object; what was refused is in none."""
    marker = 12.000 + time.time() % 1
    assert ask(http, ROW | {"mean radius": marker}, ROW | {"mean radius": marker}).status_code == 200
    assert ask(http, {"mean radius": marker}).status_code == 422

    def found() -> list[dict[str, Any]]:
        rows = [json.loads(line) for text in latest_objects(stack, two[0], 5) for line in text.splitlines()]
        return [row for row in rows if row["inputs"].get("mean radius") == marker]

    rows = wait_until(found, FLUSHED_S, "the rows in the store")
    assert len(rows) == 2
    for row in rows:
        assert set(row) == {"at", "version", "inputs", "prediction"}
        assert (row["version"], row["prediction"]) == (two[0].version, 0)
        assert row["inputs"] == ROW | {"mean radius": marker}


def latest_objects(stack: StackUnderTest, made: Made, count: int) -> list[str]:
    """The last objects of the log, read as a task does: serving itself cannot."""
    store = stack.s3("pipelines")
    pages = store.get_paginator("list_objects_v2").paginate(Bucket="predictions", Prefix=f"{made.name}/")
    keys = sorted((one["Key"] for page in pages for one in page.get("Contents", [])), reverse=True)
    return [store.get_object(Bucket="predictions", Key=key)["Body"].read().decode() for key in keys[:count]]


def test_what_waits_is_written_when_it_stops(stack: StackUnderTest, http: httpx.Client, two: list[Made]) -> None:
    """A prediction just before a restart is not lost."""
    marker = 13.000 + time.time() % 1
    assert ask(http, ROW | {"mean radius": marker}).status_code == 200
    serving = stack.container("serving")
    assert run("docker", "stop", "--time", "40", serving).code == 0
    try:
        assert any(str(marker) in text for text in latest_objects(stack, two[0], 3))
    finally:
        assert run("docker", "start", serving).code == 0
        health = ("docker", "inspect", "--format", "{{.State.Health.Status}}", serving)
        wait_until(lambda: run(*health).output.strip() == "healthy", 60, "serving is well again")
    wait_until(lambda: ask(http, ROW).status_code == 200, 30, "answers again")


def test_the_store_is_only_added_to(stack: StackUnderTest) -> None:
    """Serving's own identity puts objects into its bucket, and can neither read nor delete them."""
    client, key = stack.s3("serving"), "of-the-tests/x"
    client.put_object(Bucket="predictions", Key=key, Body=b"x")
    with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
        client.get_object(Bucket="predictions", Key=key)
    with pytest.raises(ClientError, match="AccessDenied"):
        client.delete_object(Bucket="predictions", Key=key)
    with pytest.raises(ClientError, match="AccessDenied"):
        client.list_objects_v2(Bucket="predictions")
    assert stack.s3("pipelines").get_object(Bucket="predictions", Key=key)["Body"].read() == b"x"
    for denied in ("put_object", "delete_object"):
        words = {"Body": b"y"} if denied == "put_object" else {}
        with pytest.raises(ClientError, match="AccessDenied"):
            getattr(stack.s3("pipelines"), denied)(Bucket="predictions", Key=key, **words)


def test_mlflow_is_only_read(stack: StackUnderTest, tracking: MlflowClient, two: list[Made]) -> None:
    """With serving's own login: the model and its artifacts can be read; nothing of it can be changed."""
    login = ("serving", stack.secret("mlflow_serving_password"))
    artifacts = tracking.get_logged_model(two[0].model_id).artifact_location.partition(":")[2].lstrip("/")
    of_the_run = tracking.get_run(two[0].run_id).info.artifact_uri.partition(":")[2].lstrip("/")
    with httpx.Client(base_url=stack.mlflow_url, auth=login, timeout=30) as http:
        api = "/api/2.0/mlflow"
        alias = http.get(f"{api}/registered-models/alias", params={"name": two[0].name, "alias": "champion"})
        assert alias.json()["model_version"]["version"] == two[0].version
        file = f"/api/2.0/mlflow-artifacts/artifacts/{artifacts}/MLmodel"
        assert "signature" in http.get(file).text
        assert http.put(file, content=b"x").status_code == 403
        assert http.delete(file).status_code == 403
        version = {"name": two[0].name, "version": two[1].version}
        refused = [
            http.post(f"{api}/registered-models/alias", json=version | {"alias": "champion"}),
            http.request("DELETE", f"{api}/registered-models/alias", json={"name": two[0].name, "alias": "champion"}),
            http.post(f"{api}/model-versions/set-tag", json=version | {"key": "a", "value": "b"}),
            http.request("DELETE", f"{api}/model-versions/delete", json=version),
            http.post(f"{api}/registered-models/create", json={"name": "of-serving"}),
            http.post(f"{api}/experiments/create", json={"name": "of-serving"}),
            http.post(f"{api}/runs/create", json={"experiment_id": "0"}),
            http.post(f"{api}/runs/set-tag", json={"run_id": two[0].run_id, "key": "a", "value": "b"}),
            http.post("/graphql", json={"query": "{ __typename }"}),
            http.get(f"{api}/experiments/search", params={"max_results": 1}),
            # What it was trained on is not the model.
            http.get(f"/api/2.0/mlflow-artifacts/artifacts/{of_the_run}/reference.csv"),
            http.get("/api/2.0/mlflow-artifacts/artifacts", params={"path": of_the_run}),
        ]
        assert [answer.status_code for answer in refused] == [403] * len(refused)
        assert "signature" in http.get(file).text


def test_predict(stack: StackUnderTest, two: list[Made]) -> None:
    """`make predict` prints the answer, and nothing else, on stdout; what cannot be sent is refused with a reason."""
    said = stack.make("--silent", "predict", "FILE=examples/rows.csv")
    assert said.code == 0, said.output
    answer = json.loads(said.output)
    assert (answer["version"], len(answer["predictions"])) == (two[0].version, 5)
    # The first two are malignant beyond doubt, the last one is not.
    assert (answer["predictions"][:2], answer["predictions"][-1]) == ([0, 0], 1)
    bad = stack.clone / "bad.csv"
    for text, told in (("mean radius\n1\n", "columns missing"), ("a,b\n1\n", "CSV")):
        bad.write_text(text)
        refused = stack.make("predict", f"FILE={bad}")
        assert refused.code != 0
        assert "E-ROWS" in refused.output
        assert told in refused.output
    with bad.open("wb") as file:
        # So many bytes, which take no space.
        file.truncate(2 * 10**9)
    large = stack.make("predict", f"FILE={bad}")
    assert "E-ROWS" in large.output, large.output
    assert "2000000000 bytes" in large.output
    bad.unlink()
    missing = stack.make("predict", "FILE=none.csv")
    assert "E-ROWS" in missing.output, missing.output
