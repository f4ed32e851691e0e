"""Serving's login is held to reading models, however a request names it; the generated logins keep their passwords."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlstack_logins import OnlyModels, keep_passwords


def basic(user: str) -> bytes:
    return base64.b64encode(f"{user}:a-password".encode())


def status(method: str, path: str, *headers: tuple[bytes, bytes]) -> int:
    """What a request is answered with; 200 where it got through to MLflow."""
    sent: list[Any] = []

    async def mlflow(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": list(headers)}
    asyncio.run(OnlyModels(mlflow)(scope, receive, send))
    return int(sent[0]["status"])


SERVING = (b"authorization", b"Basic " + basic("serving"))


@pytest.mark.parametrize(
    "path",
    [
        "/api/2.0/mlflow/registered-models/alias",
        "/api/2.0/mlflow/model-versions/get-download-uri",
        "/api/2.0/mlflow/logged-models/m-1",
        "/api/2.0/mlflow-artifacts/artifacts?path=1/models/m-1/artifacts",
        "/api/2.0/mlflow-artifacts/artifacts?path=1%2Fmodels%2Fm-1%2Fartifacts",
        "/api/2.0/mlflow-artifacts/artifacts/1/models/m-1/artifacts/MLmodel",
        "/api/3.0/mlflow/server-info",
    ],
)
def test_it_reads_models_and_changes_none(path: str) -> None:
    assert status("GET", path, SERVING) == 200
    for method in ("POST", "PUT", "PATCH", "DELETE", "HEAD"):
        assert status(method, path, SERVING) == 403, method


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/api/2.0/mlflow-artifacts/artifacts",
            "/api/2.0/mlflow-artifacts/artifacts?path=",
            "/api/2.0/mlflow-artifacts/artifacts?path=1/0a1b/artifacts",
            "/api/2.0/mlflow-artifacts/artifacts?path=1/models/m-1&path=1/0a1b/artifacts",
            "/api/2.0/mlflow-artifacts/artifacts?path=&path=1/models/m-1",
            "/api/2.0/mlflow-artifacts/artifacts?path=1/models/../0a1b",
            "/api/2.0/mlflow-artifacts/artifacts/1/0a1b/artifacts/reference.csv",
            "/api/2.0/mlflow-artifacts/artifacts/1/models/../0a1b/artifacts/reference.csv",
            "/api/2.0/mlflow-artifacts/artifacts/1/models/%2e%2e/0a1b/artifacts/reference.csv",
        ),
        *("/", "/graphql", "/gateway/x/invocations", "/v1/traces", "/get-artifact"),
        *(
            "/api/2.0/mlflow/experiments/search",
            "/api/2.0/mlflow/runs/get",
            "/ajax-api/2.0/mlflow/registered-models/get",
        ),
        *("/api/2.0/mlflow/users/create", "/api/2.0/mlflow/registered-models"),
    ],
)
def test_it_does_nothing_else(path: str) -> None:
    for method in ("GET", "POST"):
        assert status(method, path, SERVING) == 403, method
        assert status(method, path, (b"authorization", b"Basic " + basic("airflow"))) == 200
        assert status(method, path) == 200
        assert status(method, path, (b"authorization", b"Basic !"), (b"x-other", SERVING[1])) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"basic  " + basic("serving"))],
        [(b"authorization", b"Basic\t" + basic("serving"))],
        [(b"authorization", b"Basic\xa0" + basic("serving"))],
        [(b"authorization", b"Basic\x85" + basic("serving"))],
        [(b"authorization", b"Basic " + basic("serving")[:8] + b"," + basic("serving")[8:])],
        [(b"authorization", b"Basic " + basic("airflow")), SERVING],
        [SERVING, (b"authorization", b"Basic " + basic("airflow"))],
        [(b"x-mlflow-authorization", SERVING[1])],
    ],
)
def test_no_way_of_writing_it_gets_around(headers: list[tuple[bytes, bytes]]) -> None:
    """What one of MLflow's two applications reads as this login is held to be it."""
    assert status("POST", "/api/2.0/mlflow/experiments/create", *headers) == 403


class FakeStore:
    """MLflow's store of logins: keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str | None, bool | None]] = []

    def update_user(self, username: str, password: str | None = None, is_admin: bool | None = None) -> str:
        self.told.append((username, password, is_admin))
        return username


def test_the_generated_logins_keep_their_passwords() -> None:
    store = FakeStore()
    keep_passwords(store)
    for user in ("airflow", "serving"):
        with pytest.raises(MlflowException, match=f"password of {user}") as error:
            store.update_user(user, password="another-password")
        assert error.value.get_http_status_code() == 403
        assert store.update_user(user, is_admin=False) == user
    assert store.update_user("ada", password="another-password") == "ada"
    assert store.told == [("airflow", None, False), ("serving", None, False), ("ada", "another-password", None)]
