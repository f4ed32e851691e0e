"""MLflow's application with a shorter way for artifacts.

MLflow 3.17 answers `GET /mlflow-artifacts/artifacts/…` after it has the whole artifact in a file. Here
that route is answered before MLflow's, as the bytes are read from the store. MLflow's middleware, which
asks for the login and the permission by the path, stands before both alike.

That middleware (Starlette's BaseHTTPMiddleware, several deep) also carries each piece of a body
through task groups and queues of its own. It looks at heads only, so the bodies go around it.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from mlflow.exceptions import MlflowException
from mlflow.server import auth
from mlflow.server.artifact_router import _get_artifact_repo, _get_workspace_scoped_path
from mlflow.server.handlers import _content_disposition_attachment
from mlflow.utils.mime_type_utils import _guess_mime_type
from mlflow.utils.uri import validate_path_is_safe
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIXES = ("/api/2.0/mlflow-artifacts/artifacts/", "/ajax-api/2.0/mlflow-artifacts/artifacts/")
UP, DOWN = "mlstack.up", "mlstack.down"
"""In a request's scope: what gives the body of an upload, and the pieces of a download."""


def create_app() -> FastAPI:
    """MLflow's application with logins, and ours in front of its artifact routes."""
    app = auth.create_app()
    for prefix in PREFIXES:
        app.router.routes.insert(0, Route(prefix + "{path:path}", download, methods=["GET"]))
    app.user_middleware.insert(0, Middleware(Around))
    app.user_middleware.append(Middleware(Inside))
    return app


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


class Around:
    """Outermost: keeps where an upload comes from, and sends a download itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIXES):
            await self.app(scope, receive, send)
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
