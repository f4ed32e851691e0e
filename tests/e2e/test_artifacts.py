"""Artifacts through the tracking server: they stream, they arrive whole or not at all, and only where one may."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from tests.support import StackUnderTest, wait_until

PATH = "/api/2.0/mlflow-artifacts/artifacts/"
BLOCK = 8 << 20
"""Of mlstack_artifacts: what is larger goes up in parts."""
BUCKET = "mlflow"
PATIENCE_S = 30


@pytest.fixture(scope="module")
def http(stack: StackUnderTest) -> Iterator[httpx.Client]:
    login = (stack.settings.admin_user, stack.secret("admin_password"))
    with httpx.Client(base_url=stack.mlflow_url, auth=login, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def s3(stack: StackUnderTest) -> Any:
    return stack.s3("mlflow")


@pytest.fixture
def path(http: httpx.Client) -> Iterator[str]:
    name = f"test-artifacts/{time.time_ns()}.txt"
    yield name
    http.delete(PATH + name)


@pytest.mark.parametrize("size", [0, 5, BLOCK, 2 * BLOCK + 12345])
def test_what_goes_up_comes_down(http: httpx.Client, s3: Any, path: str, size: int) -> None:
    data = os.urandom(size)
    assert http.put(PATH + path, content=data).status_code == 200
    answer = http.get(PATH + path)
    assert answer.content == data
    assert answer.headers["content-length"] == str(size)
    assert answer.headers["content-type"].startswith("text/plain")
    assert "attachment" in answer.headers["content-disposition"]
    kept = s3.head_object(Bucket=BUCKET, Key=path)
    assert kept["ContentType"] == "text/plain"


def test_an_upload_is_in_the_store_before_it_has_ended(
    stack: StackUnderTest, http: httpx.Client, s3: Any, path: str
) -> None:
    """Its first part is there while the last one is not yet sent, and the server has no file of it."""
    block = os.urandom(BLOCK)

    def pieces() -> Iterator[bytes]:
        yield block
        yield block
        wait_until(lambda: len(parts(s3, path)) >= 1, PATIENCE_S, "a part in the store")
        files = stack.exec("mlflow", "find", "/tmp", "-type", "f", "-size", "+1000k").output
        assert not files.strip(), files
        yield b"end"

    assert http.put(PATH + path, content=pieces()).status_code == 200
    assert http.get(PATH + path).content == block + block + b"end"


def test_a_download_begins_before_the_server_has_read_it_all(
    stack: StackUnderTest, http: httpx.Client, path: str
) -> None:
    """One that nobody reads on stands still, without a file of it in the server and without its memory."""
    size = 12 * BLOCK
    assert http.put(PATH + path, content=os.urandom(size)).status_code == 200
    with http.stream("GET", PATH + path) as answer:
        first = next(answer.iter_raw(1 << 16))
        assert first
        files = stack.exec("mlflow", "find", "/tmp", "-type", "f", "-size", "+1000k").output
        assert not files.strip(), files
    assert len(http.get(PATH + path).content) == size


def test_an_upload_that_breaks_off_leaves_nothing(
    stack: StackUnderTest, http: httpx.Client, s3: Any, path: str
) -> None:
    """Neither an artifact that looks whole nor parts that nobody counts."""
    request = http.build_request("PUT", PATH + path, content=b"")
    login = next(httpx.BasicAuth(stack.settings.admin_user, stack.secret("admin_password")).auth_flow(request))
    head = (
        f"PUT {PATH}{path} HTTP/1.1\r\nHost: localhost:{stack.settings.mlflow_port}\r\n"
        f"Authorization: {login.headers['authorization']}\r\nContent-Length: {5 * BLOCK}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", stack.settings.mlflow_port), timeout=PATIENCE_S) as line:
        line.sendall(head.encode() + os.urandom(3 * BLOCK))
        wait_until(lambda: uploads(s3, path), PATIENCE_S, "an unfinished upload in the store")
    wait_until(lambda: not uploads(s3, path), PATIENCE_S, "the unfinished upload to be taken back")
    with pytest.raises(ClientError, match="404"):
        s3.head_object(Bucket=BUCKET, Key=path)


def test_more_uploads_than_a_process_streams_at_once_arrive_too(http: httpx.Client, path: str) -> None:
    sent = {f"{path}.{index}": os.urandom(BLOCK + index) for index in range(20)}
    with ThreadPoolExecutor(len(sent)) as pool:
        answers = list(pool.map(lambda one: http.put(PATH + one[0], content=one[1]).status_code, sent.items()))
    assert answers == [200] * len(sent)
    for name, data in sent.items():
        assert http.get(PATH + name).content == data
        http.delete(PATH + name)


@pytest.mark.parametrize("prefix", [PATH, PATH.replace("/api/", "/ajax-api/")])
def test_nothing_without_a_login(http: httpx.Client, s3: Any, path: str, prefix: str) -> None:
    assert http.put(PATH + path, content=b"secret").status_code == 200
    stranger = httpx.Client(base_url=http.base_url, timeout=30)
    assert stranger.get(prefix + path).status_code == 401
    assert stranger.head(prefix + path).status_code == 405
    assert stranger.put(prefix + path, content=b"other").status_code == 401
    assert s3.get_object(Bucket=BUCKET, Key=path)["Body"].read() == b"secret"


def test_who_may_only_read_cannot_write(http: httpx.Client) -> None:
    """MLflow's permissions are asked before our routes as before its own: by the experiment in the path."""
    name, password = f"reader{time.time_ns()}", "only-for-this-test"
    experiment = post(http, "experiments/create", name=name)["experiment_id"]
    place = f"{PATH}{experiment}/run/artifacts/file.txt"
    assert http.put(place, content=b"secret").status_code == 200
    post(http, "users/create", username=name, password=password)
    try:
        reader = httpx.Client(base_url=http.base_url, auth=(name, password), timeout=30)
        assert reader.get(place).content == b"secret"
        assert reader.put(place, content=b"other").status_code == 403
        refused = {"username": name, "resource_type": "experiment", "resource_id": experiment}
        post(http, "users/permissions/grant", version="3.0", **refused, permission="DENY")
        assert reader.get(place).status_code == 403
        assert http.get(place).content == b"secret"
    finally:
        http.request("DELETE", "/api/2.0/mlflow/users/delete", json={"username": name})
        http.delete(place)
        post(http, "experiments/delete", experiment_id=experiment)


def test_what_is_not_there_is_said(http: httpx.Client) -> None:
    missing = http.get(PATH + "test-artifacts/nothing.txt")
    assert missing.status_code == 404
    assert missing.json()["error_code"] == "RESOURCE_DOES_NOT_EXIST"
    assert http.get(PATH + "%2e%2e/%2e%2e/etc/passwd").status_code == 400


def post(http: httpx.Client, path: str, version: str = "2.0", **body: str) -> dict[str, Any]:
    answer = http.post(f"/api/{version}/mlflow/{path}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def uploads(s3: Any, path: str) -> list[str]:
    found = s3.list_multipart_uploads(Bucket=BUCKET, Prefix=path).get("Uploads", [])
    return [one["UploadId"] for one in found]


def parts(s3: Any, path: str) -> list[Any]:
    found: list[Any] = []
    for upload in uploads(s3, path):
        found += s3.list_parts(Bucket=BUCKET, Key=path, UploadId=upload).get("Parts", [])
    return found
