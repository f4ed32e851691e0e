"""A Git host as a company has one: repositories behind TLS, with a certificate of its own, and a login.

    git_server.py FOLDER CERTIFICATE PORT

Serves the repositories in FOLDER to whoever has the token `TOKEN`, with git's own program for it. The tests run it
in a thread, and in a container of Airflow's image beside the stack.
"""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "let-me-read-2718"


class Handler(BaseHTTPRequestHandler):
    """One request, handed to `git http-backend`."""

    folder: Path

    def do_GET(self) -> None:
        login = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if not login.endswith(f":{TOKEN}"):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        variables = {
            "GIT_PROJECT_ROOT": str(self.folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
        words = ["git", "http-backend"]
        done = subprocess.run(words, input=body, stdout=subprocess.PIPE, env={**os.environ, **variables}, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        # Else the end is the connection's, which looks like an attack to the client: Python does not announce it.
        fields["Content-Length"] = str(len(content))
        for name_of, value in fields.items():
            self.send_header(name_of, value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def server(folder: Path, certificate: Path, address: tuple[str, int]) -> ThreadingHTTPServer:
    """A server that listens already."""
    handler = type("Of", (Handler,), {"folder": folder})
    made = ThreadingHTTPServer(address, handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    made.socket = context.wrap_socket(made.socket, server_side=True)
    return made


if __name__ == "__main__":
    with server(Path(sys.argv[1]), Path(sys.argv[2]), ("", int(sys.argv[3]))) as running:
        print("ready", flush=True)
        running.serve_forever()
