"""A small client of the serving service, for the programs and the tests."""

from __future__ import annotations

import re
from typing import Any

import httpx

from stack.answers import Client, good
from stack.errors import Exit, StackError

REFUSED = (400, 413, 415, 422)
"""How serving answers to rows that it cannot take."""


class Serving:
    """The predictions' API with its token. A context manager; each call raises StackError where it cannot be had."""

    def __init__(self, url: str, token: str) -> None:
        self._http = Client("serving", url, headers={"Authorization": f"Bearer {token}"})

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def predict(self, body: bytes, kind: str) -> dict[str, Any]:
        """The answer to rows in a content type of MLflow's scoring protocol."""
        found: dict[str, Any] = self._ask("POST", "/invocations", content=body, headers={"Content-Type": kind}).json()
        return found

    def schema(self) -> dict[str, Any]:
        """What the model takes, and which version it is."""
        found: dict[str, Any] = self._ask("GET", "/schema").json()
        return found

    def stored(self) -> int:
        """How many predictions it has written to the store since it started."""
        told = re.search(r"^serving_log_written_rows_total (\S+)$", self._ask("GET", "/metrics").text, re.MULTILINE)
        return int(float(told[1])) if told else 0

    def _ask(self, method: str, path: str, **words: Any) -> httpx.Response:
        answer = self._http.request(method, path, **words)
        told = answer.json() if answer.headers.get("content-type") == "application/json" else {}
        if told.get("error") == "NO_MODEL":
            raise StackError(
                "E-CHAMPION",
                "no model answers",
                why=str(told["message"]),
                fix="register a version and give it the alias, as `make demo` does; serving follows within seconds",
            )
        if answer.status_code in REFUSED:
            raise StackError(
                "E-ROWS",
                f"the rows were refused ({answer.status_code})",
                why=str(told.get("message", answer.text))[:500],
                fix="send the columns of examples/rows.csv, or those that /schema names for your own model",
                exit_code=Exit.FAILED,
            )
        return good(answer, "E-SERVING-API", "Serving", "see `make logs S=serving`")
