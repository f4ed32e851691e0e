"""How Celery's processes and tasks talk to the guard: JSON messages over a local socket.

The socket is abstract: no file, nothing left behind, reachable within the container only. Whoever
asks goes on without an answer when the guard is away; it is back within seconds.
"""

from __future__ import annotations

import json
import socket
from typing import Any

ADDRESS = "\0taskguard"
LARGEST = 65536
PATIENCE_S = 2.0
"""How long an answer may take that does not depend on other tasks."""


def listen() -> socket.socket:
    """The guard's end."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    server.bind(ADDRESS)
    server.listen(512)
    server.setblocking(False)
    return server


def connect() -> socket.socket:
    """The other end. Raises OSError when there is no guard."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    client.settimeout(PATIENCE_S)
    try:
        client.connect(ADDRESS)
    except OSError:
        client.close()
        raise
    return client


def send(link: socket.socket, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
    """Sends one message, with open descriptors if need be. Raises OSError."""
    data = json.dumps(message).encode()
    if descriptors:
        socket.send_fds(link, [data], descriptors)
    else:
        link.send(data)


def receive(link: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its descriptors; None at the end. Raises OSError, TimeoutError included."""
    data, descriptors, _, _ = socket.recv_fds(link, LARGEST, 4)
    return (json.loads(data) if data else None), list(descriptors)


def ask(link: socket.socket, message: dict[str, Any], descriptors: list[int] | None = None) -> dict[str, Any]:
    """Sends a message and waits for its answer. Raises OSError when there is none."""
    send(link, message, descriptors)
    answer, _ = receive(link)
    if answer is None:
        raise ConnectionError("the guard hung up")
    return answer


def tell(message: dict[str, Any], descriptors: list[int] | None = None) -> bool:
    """Sends a message on a connection of its own, expecting no answer; False when there is no guard."""
    try:
        with connect() as link:
            send(link, message, descriptors)
    except OSError:
        return False
    return True


def peer(link: socket.socket) -> int:
    """The process at the other end, as the kernel knows it."""
    return int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
