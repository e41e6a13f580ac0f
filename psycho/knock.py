"""Whether anything listens at an address, asked before Ray is: it would try for minutes, and say so in its own way."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a gRPC client begins; Ray's services answer it at once, and so does any HTTP server."""
KNOCK_S = 5.0
"""The longest wait for an answer, the look-up of the host's name included."""


def host_and_port(address: str) -> tuple[str, int] | None:
    """Where to knock for a RAY_ADDRESS, or None where it names no host ("auto", "local").

    >>> host_and_port("ray://head:10001")
    ('head', 10001)
    """
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        port = parts.port
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def answers(address: str, limit_s: float = KNOCK_S) -> bool | None:
    """Whether something listens at a RAY_ADDRESS; None where it names no host."""
    target = host_and_port(address)
    if target is None:
        return None
    found = threading.Event()

    def knock() -> None:
        try:
            with socket.create_connection(target, limit_s) as connection:
                if not os.environ.get("RAY_USE_TLS", "0").strip("0"):
                    connection.sendall(_GREETING)
                    if not connection.recv(1):  # a tunnel whose other end is gone takes the call, and hangs up
                        return
                found.set()
        except OSError:
            return

    # In a thread, because looking up a name has no limit.
    thread = threading.Thread(target=knock, daemon=True, name="knock")
    thread.start()
    thread.join(limit_s)
    return found.is_set()
