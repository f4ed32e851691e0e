"""What the generated logins may not do: serving's reads registered models and does nothing else, and no request
changes their passwords.

MLflow's permissions cannot say so. In this stack everybody may read everything (`default_permission = READ`), and
whoever can log in can create experiments and models, which are theirs then. A DENY would stop that, but one for
all experiments stops reading too, and none can be lifted for a single model.

So its requests are held against a list before MLflow sees them. Everybody else's pass. What MLflow itself refuses,
a wrong password first of all, it goes on to refuse.

A login may change its own password, as far as MLflow is concerned. Here any task could, and lock all others out.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from typing import Any
from urllib.parse import parse_qs

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

GENERATED = frozenset({"airflow", "serving"})
"""Those that mlflow-init makes, and gives the passwords of secrets/; it does so again only when these change."""
READERS = frozenset({b"serving"})
READABLE = (
    "/api/2.0/mlflow/registered-models/",
    "/api/2.0/mlflow/model-versions/",
    "/api/2.0/mlflow/logged-models/",
    "/api/3.0/mlflow/server-info",
)
"""What MLflow's client asks for, with GET, on the way from an alias to a loaded model."""
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
OF_A_MODEL = re.compile(r"/?\d+/models/(?!.*(\.\.|%))")
"""Where below ARTIFACTS a model's files are: a run's other artifacts, training data among them, are elsewhere."""
HEADERS = frozenset({b"authorization", b"x-mlflow-authorization"})


def keep_passwords(store: Any) -> None:
    """From now on the store of logins sets no password of GENERATED, whoever asks for it, an admin included."""
    update_user = store.update_user

    @functools.wraps(update_user)
    def update(username: str, password: str | None = None, is_admin: bool | None = None) -> Any:
        if password is not None and username in GENERATED:
            raise MlflowException(f"the password of {username} is that of secrets/", PERMISSION_DENIED)
        return update_user(username, password=password, is_admin=is_admin)

    store.update_user = update


class OnlyModels:
    """Outermost: refuses what one of READERS asks beyond READABLE."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_reading(scope) or READERS.isdisjoint(users(scope)):
            await self.app(scope, receive, send)
            return
        error = {"error_code": "PERMISSION_DENIED", "message": "this login reads registered models and nothing else"}
        await JSONResponse(error, 403)(scope, receive, send)


def is_reading(scope: Scope) -> bool:
    """Whether a request reads of models."""
    if scope["method"] != "GET":
        return False
    path: str = scope["path"]
    if path == ARTIFACTS:
        listed = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True).get("path", [])
        return bool(listed) and all(OF_A_MODEL.match(one) for one in listed)
    if path.startswith(ARTIFACTS):
        return bool(OF_A_MODEL.match(path.removeprefix(ARTIFACTS)))
    return path.startswith(READABLE)


def users(scope: Scope) -> set[bytes]:
    """Everybody whom a request may be from.

    MLflow's two applications read a header each in their own way: FastAPI's takes the first and its second word,
    Flask's what follows the first space of all of them, joined. Whoever is found by any of these is meant.
    """
    values = [value.decode("latin-1") for name, value in scope["headers"] if name in HEADERS]
    # As text, like FastAPI: that has more kinds of space between words than bytes have.
    texts = {text for value in (*values, ",".join(values)) for text in (*value.split()[1:], value.partition(" ")[2])}
    found = set()
    for text in texts:
        try:
            found.add(base64.b64decode(text.encode("latin-1")).partition(b":")[0])
        except binascii.Error:
            continue
    return found
