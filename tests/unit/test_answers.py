"""The client of the programs, where nobody answers."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stack.airflow import Airflow
from stack.answers import Client
from stack.errors import Exit, StackError


class Empty(BaseHTTPRequestHandler):
    post = 204

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def do_POST(self) -> None:
        self.send_response(self.post)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get the login."""
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Empty) as server:
        # Where nobody asks it, it waits for ever.
        threading.Thread(target=server.handle_request, daemon=True).start()
        with Client("Airflow", f"http://127.0.0.1:{server.server_port}") as client:
            assert client.get("/").status_code == 204


def test_a_service_that_does_not_answer_is_an_error_of_ours() -> None:
    """At the first question nothing can have been changed; later something can."""
    server = HTTPServer(("127.0.0.1", 0), Empty)
    url = f"http://127.0.0.1:{server.server_port}"
    answers = threading.Thread(target=server.handle_request)
    answers.start()
    with Client("Airflow", url) as late:
        assert late.get("/").status_code == 204
        answers.join()
        server.server_close()
        with pytest.raises(StackError, match="Airflow does not answer") as later:
            late.get("/")
    with Client("Airflow", url) as never, pytest.raises(StackError, match="Airflow does not answer") as first:
        never.get("/")
    assert (first.value.code, first.value.exit_code) == ("E-NO-STACK", Exit.PRECONDITION)
    assert (later.value.code, later.value.exit_code) == ("E-NO-STACK", Exit.FAILED)


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        *((status, "E-LOGIN", Exit.PRECONDITION) for status in (400, 401, 403)),
        *((status, "E-AIRFLOW-API", Exit.FAILED) for status in (404, 500, 503)),
    ],
)
def test_a_failing_airflow_is_no_wrong_password(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, exit_code: Exit
) -> None:
    """It answers 500 to a login while its database is down."""
    monkeypatch.setattr(Empty, "post", status)
    with HTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(StackError, match=r"Airflow .*(refused|answered)") as error:
            Airflow(f"http://127.0.0.1:{server.server_port}", "admin", "x")
    assert (error.value.code, error.value.exit_code) == (code, exit_code)
    assert str(status) in str(error.value)
