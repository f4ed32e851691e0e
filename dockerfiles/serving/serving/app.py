"""HTTP: the routes, the token, what is answered."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import inputs
from serving.follower import Follower
from serving.inputs import RefusedError
from serving.prediction_log import PredictionLog, finite

if TYPE_CHECKING:
    from serving.metrics import Metrics
    from serving.model import Model

log = logging.getLogger(__name__)

OPEN = frozenset({"/health/live", "/health/ready"})
"""Paths that need no token: probes have none."""
LARGEST = 5 << 20
"""Bytes of a request's body."""
DRAINED = 64 << 20
"""A body that is too large is read to its end nevertheless, up to here: its sender reads no answer before."""
THREADS = 2
BUSY = 64
"""Requests under way; with more, all would become slow."""
HELD = 64 << 20
"""Bytes of bodies under way: of large ones there are fewer."""
SLOW_S = 30
"""Seconds within which a body has to come."""


def create() -> Starlette:
    """The application of the environment, as uvicorn asks for it."""
    from serving import model, store
    from serving.metrics import Metrics
    from serving.registry import Registry

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It tells of each try; the follower tells once that MLflow is away.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    registry = Registry(os.environ["SERVING_MODEL"], os.environ["SERVING_ALIAS"])
    follower = Follower(registry, model.load)
    predictions = PredictionLog(registry.model, store.writer())
    return build(follower, predictions, Metrics(follower, predictions), os.environ["SERVING_TOKEN"])


def build(follower: Follower, predictions: PredictionLog, metrics: Metrics, token: str) -> Starlette:
    """The application around these."""
    api = Api(follower, predictions, metrics)

    @contextlib.asynccontextmanager
    async def life(_app: Starlette) -> AsyncIterator[None]:
        follower.start()
        predictions.start()
        yield
        follower.stop()
        api.pool.shutdown()
        await asyncio.to_thread(predictions.stop)

    routes = [
        Route("/invocations", api.invocations, methods=["POST"]),
        Route("/schema", api.schema),
        Route("/metrics", api.figures),
        Route("/health/live", api.live),
        Route("/health/ready", api.ready),
    ]
    return Starlette(
        routes=routes,
        lifespan=life,
        middleware=[Middleware(Token, token=token)],
        exception_handlers={HTTPException: _not_here, RefusedError: _refused, Exception: _failed},
    )


class Token:
    """Lets nobody in without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._is_good(scope):
            await self.app(scope, receive, send)
            return
        answer = _error(401, "TOKEN", "send the header `Authorization: Bearer` with the token of secrets/serving_token")
        answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)

    def _is_good(self, scope: Scope) -> bool:
        told = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(told, self._wanted)


class Api:
    """The routes."""

    def __init__(self, follower: Follower, predictions: PredictionLog, metrics: Metrics) -> None:
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="predict")
        self._follower = follower
        self._predictions = predictions
        self._metrics = metrics
        self._busy = 0
        self._held = 0
        self._one_large = threading.Lock()

    async def invocations(self, request: Request) -> Response:
        """Predictions for the rows of a request."""
        began = time.perf_counter()
        try:
            answer = await self._predict(request)
        except RefusedError as refused:
            answer = _error(refused.status, refused.code, refused.message)
        except ClientDisconnect:
            # Nobody is there to read this.
            answer = Response(status_code=499)
        except Exception:
            log.exception("a request could not be answered")
            answer = _error(500, "FAILED", "the model could not answer; the service's log says why")
        self._metrics.answered(answer.status_code, time.perf_counter() - began)
        return answer

    async def _predict(self, request: Request) -> Response:
        # Once: a swap in the middle concerns the next request.
        model = self._model()
        if self._busy >= BUSY:
            raise RefusedError(503, "BUSY", f"{BUSY} requests are under way; try again")
        self._busy += 1
        pieces: list[bytes] = []
        try:
            await self._read(request, pieces)
            pieces[:] = [b"".join(pieces)]
            kind = request.headers.get("content-type", "")
            return await asyncio.get_running_loop().run_in_executor(self.pool, self._answer, model, pieces[0], kind)
        finally:
            self._busy -= 1
            self._let_go(pieces)

    def _let_go(self, pieces: list[bytes]) -> None:
        self._held -= sum(map(len, pieces))
        pieces.clear()

    async def _read(self, request: Request, pieces: list[bytes]) -> None:
        """The body. Raises RefusedError for one that is slow (408) or large (413), and with too many at once (503)."""
        try:
            await asyncio.wait_for(self._take(request, pieces), SLOW_S)
        except TimeoutError:
            raise RefusedError(408, "SLOW", f"the request did not come within {SLOW_S} s") from None

    async def _take(self, request: Request, pieces: list[bytes]) -> None:
        length = 0
        async for piece in request.stream():
            length += len(piece)
            if length > DRAINED:
                break
            if length > LARGEST:
                self._let_go(pieces)
            elif self._held + len(piece) > HELD:
                raise RefusedError(503, "BUSY", f"requests of {HELD >> 20} MB are under way; try again")
            else:
                pieces.append(piece)
                self._held += len(piece)
        if length > LARGEST:
            raise RefusedError(413, "TOO_LARGE", f"a request has at most {LARGEST >> 20} MB: send its rows in several")

    def _model(self) -> Model:
        state = self._follower.state
        if state.model is None:
            raise RefusedError(503, "NO_MODEL", state.why)
        return state.model

    def _answer(self, model: Model, body: bytes, kind: str) -> Response:
        """In a thread of the pool: reads, predicts, keeps the rows. One large body at a time, for there is memory for
        the values of one."""
        with self._one_large if len(body) > inputs.LARGE else contextlib.nullcontext():
            return self._read_and_predict(model, body, kind)

    def _read_and_predict(self, model: Model, body: bytes, kind: str) -> Response:
        table = inputs.parse(body, kind, model.columns)
        try:
            told = model.predict(table)
        except ValueError as error:
            # How scikit-learn and XGBoost say that they do not take a value, a missing one most often.
            raise RefusedError(422, "MODEL", f"the model does not take these rows: {error}"[:500]) from error
        version = model.version
        text = _json({"predictions": told, "model": version.model, "version": version.number})
        self._predictions.add(version.number, table, told)
        return Response(text, media_type="application/json", headers={"X-Model-Version": version.number})

    async def schema(self, _request: Request) -> Response:
        """What the model takes, and which one it is."""
        return JSONResponse(self._model().schema())

    async def figures(self, _request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics.render(), headers={"Content-Type": self._metrics.content_type})

    async def live(self, _request: Request) -> Response:
        """Whether it answers and goes on asking MLflow, with or without a model."""
        stalled = self._follower.stalled
        return JSONResponse({"status": "stalled" if stalled else "live"}, 503 if stalled else 200)

    async def ready(self, _request: Request) -> Response:
        """Whether there is a model, which one, and what is not as it should be."""
        state = self._follower.state
        told: dict[str, Any] = {"status": "ready" if state.model else "not ready"}
        if state.model:
            told |= {"model": state.model.version.model, "version": state.model.version.number}
        else:
            told |= {"reason": state.why}
        if state.failure:
            told |= {"failed": {"version": state.failure.version.number, "error": state.failure.error}}
        if state.unreachable:
            told |= {"mlflow": state.unreachable}
        return JSONResponse(told, 200 if state.model else 503)


def _json(document: dict[str, Any]) -> str:
    try:
        return json.dumps(document, separators=(",", ":"), allow_nan=False, default=_python)
    except ValueError:
        return json.dumps(finite(document), separators=(",", ":"), default=_python)


def _python(value: Any) -> Any:
    """NumPy's scalars and arrays as Python's own; what else there may be as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _error(status: int, code: str, message: str) -> Response:
    # Escaped: a message may repeat half a character that a client sent.
    return Response(_json({"error": code, "message": message}), status, media_type="application/json")


async def _not_here(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "NOT_FOUND", 405: "METHOD"}.get(error.status_code, "HTTP")
    answer = _error(error.status_code, code, error.detail)
    answer.headers.update(error.headers or {})
    return answer


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _error(error.status, error.code, error.message)


async def _failed(_request: Request, _: Exception) -> Response:
    return _error(500, "FAILED", "this could not be answered; the service's log says why")
