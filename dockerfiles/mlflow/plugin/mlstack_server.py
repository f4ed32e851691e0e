"""MLflow's application with shorter ways.

*Artifacts.* MLflow 3.17 answers `GET /mlflow-artifacts/artifacts/…` after it has the whole artifact in a file. Here
that route is answered before MLflow's, as the bytes are read from the store. MLflow's middleware, which
asks for the login and the permission by the path, stands before both alike.

That middleware (Starlette's BaseHTTPMiddleware, several deep) also carries each piece of a body
through task groups and queues of its own. It looks at heads only, so the bodies go around it.

*Runs, experiments, models.* MLflow's Flask application answers these, asks for the login and the permission
itself, and resolves the workspace itself. On its way there a request passes the same middleware, which then
does nothing but cost a third of a small request's CPU. Such requests go to Flask at once, through what looks
at the host, the origin and the answer's headers, and their answers come back whole, not piece by piece
between two threads.

*JSON* is made in one pass (mlstack_json.py).

*Serving's login* is held to what it needs before all of that, and the generated logins keep their passwords
(mlstack_logins.py).
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import re
from typing import Any

import mlstack_json
import mlstack_permissions
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from mlflow.exceptions import MlflowException
from mlflow.server import app as flask_app
from mlflow.server import auth
from mlflow.server.artifact_router import _get_artifact_repo, _get_workspace_scoped_path
from mlflow.server.handlers import _content_disposition_attachment
from mlflow.utils.mime_type_utils import _guess_mime_type
from mlflow.utils.uri import validate_path_is_safe
from mlstack_logins import OnlyModels, keep_passwords
from starlette.middleware import Middleware
from starlette.middleware.wsgi import build_environ
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Server
from werkzeug.wrappers import Response as Answer

PREFIXES = ("/api/2.0/mlflow-artifacts/artifacts/", "/ajax-api/2.0/mlflow-artifacts/artifacts/")
FLASK = re.compile(r"/(ajax-)?api/2\.0/mlflow/(?!.*artifact)")
"""None of these paths is FastAPI's (a test in tests/stack compares them). Artifacts may be large: not these."""
NOT_FOR_FLASK = {"fastapi_permission_middleware", "gateway_timing_middleware", "workspace_context_middleware"}
"""Middleware for FastAPI's own routes: Flask does the same in its before_request, and the gateway is FastAPI's."""
ALLOCATIONS = 50_000
"""Objects made between two rounds of the garbage collector (2,000 by default). A search makes tens of thousands
that are gone with its answer; looking through them took a sixth of its CPU."""
UP, DOWN = "mlstack.up", "mlstack.down"
"""In a request's scope: what gives the body of an upload, and the pieces of a download."""


def create_app() -> FastAPI:
    """MLflow's application with logins, and ours in front of its artifact routes and of Flask."""
    gc.set_threshold(ALLOCATIONS)
    mlstack_json.install()
    Server.main_loop = look_each_second
    app = auth.create_app()
    mlstack_permissions.install()
    keep_passwords(auth.store)
    flask = straight_to_flask(app)
    for prefix in PREFIXES:
        app.router.routes.insert(0, Route(prefix + "{path:path}", download, methods=["GET"]))
    app.user_middleware.insert(0, Middleware(Around))
    app.user_middleware.append(Middleware(Inside))
    app.user_middleware.insert(0, Middleware(Fork, flask=flask))
    app.user_middleware.insert(0, Middleware(OnlyModels))
    return app


async def look_each_second(server: Server) -> None:
    """In place of uvicorn's loop, which looks ten times a second whether to end: each process took 3 ms of CPU a
    second for it."""
    while not await server.on_tick(0):
        await asyncio.sleep(1)


def straight_to_flask(app: FastAPI) -> ASGIApp:
    """Flask, inside of all middleware but what does not concern it."""
    flask: ASGIApp = Flask()
    for one in reversed(app.user_middleware):
        if getattr(one.kwargs.get("dispatch"), "__name__", "") not in NOT_FOR_FLASK:
            flask = one.cls(flask, *one.args, **one.kwargs)
    return flask


async def download(request: Request) -> Response:
    """An artifact, as it is read from the store."""
    try:
        path = _get_workspace_scoped_path(validate_path_is_safe(request.path_params["path"]))
        length, pieces = await _get_artifact_repo().open(path)
    except MlflowException as error:
        return JSONResponse(json.loads(error.serialize_as_json()), error.get_http_status_code())
    name = path.rsplit("/", 1)[-1]
    headers = {
        "Content-Type": _guess_mime_type(name),
        "Content-Length": str(length),
        "Content-Disposition": _content_disposition_attachment(name),
        "X-Content-Type-Options": "nosniff",
    }
    request.scope[DOWN] = pieces
    return Response(headers=headers)


class Fork:
    """Outermost: sends what Flask answers to Flask."""

    def __init__(self, app: ASGIApp, flask: ASGIApp) -> None:
        self.app = app
        self.flask = flask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        way = self.flask if scope["type"] == "http" and FLASK.match(scope["path"]) else self.app
        await way(scope, receive, send)


class Flask:
    """MLflow's Flask application, for answers that fit into memory."""

    @functools.cached_property
    def limiter(self) -> CapacityLimiter:
        """One fewer at once than there are connections to the database: a batch of metrics holds one while it asks
        for a second, and if each did none would get it. What waits for a thread would only wait for a connection."""
        settings = ("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW")
        return CapacityLimiter(sum(int(os.environ[name]) for name in settings) - 1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces, more = [], True
        while more:
            message = await receive()
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        environ = build_environ(scope, b"".join(pieces))
        status, headers, body = await to_thread.run_sync(self._answer, environ, limiter=self.limiter)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def _answer(environ: dict[str, Any]) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        answer = Answer.from_app(flask_app, environ, buffered=True)
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
        return answer.status_code, headers, answer.get_data()


class Around:
    """Around MLflow's middleware: keeps where an upload comes from, and sends a download itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIXES):
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # A route for GET takes it, too, and MLflow asks for no login then.
            await Response(status_code=405, headers={"Allow": "GET, PUT, DELETE"})(scope, receive, send)
            return
        scope[UP] = receive
        head: Message = {}

        async def answer(message: Message) -> None:
            nonlocal head
            if DOWN not in scope:
                await send(message)
            elif message["type"] == "http.response.start":
                head = message
            elif not message.get("more_body"):
                response = StreamingResponse(scope[DOWN], head["status"])
                response.raw_headers = head["headers"]
                await response(scope, receive, send)

        await self.app(scope, receive, answer)


class Inside:
    """Innermost: lets an upload come from there, and not through what lies between."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        source: Any = scope.get(UP, receive)
        await self.app(scope, source, send)
