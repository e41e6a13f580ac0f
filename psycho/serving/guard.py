"""What stands around the HTTP application: the key, the notice, the size of a body, the last error handler.

Plain ASGI rather than a Starlette middleware, which would stand between a stream and its client's disconnect.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psycho.serving.protocol import MAX_BODY_BYTES, NOTICE, ApiError

_log = logging.getLogger("ray.serve")


def digest(key: str) -> bytes:
    """What is kept of a key: it never leaves the process that starts the application."""
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """Around the whole application: the key, the notice, the size of a body, and errors nobody foresaw."""

    def __init__(self, app: ASGIApp, key_digest: bytes | None) -> None:
        self._app, self._key = app, key_digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def noticed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-psycho-notice", NOTICE.encode())]}
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, _bounded(receive), noticed)
        except ApiError as error:
            await respond(error)(scope, receive, noticed)
        except Exception as error:  # answered already; its text may hold what was sent
            _log.error("the gateway failed: %s", type(error).__name__)

    def _check(self, scope: Scope) -> None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        if self._key is not None and scope["path"] != "/health":
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = hashlib.sha256(key.strip()).digest()
            if not hmac.compare_digest(given, self._key) or scheme.lower() != b"bearer":
                raise ApiError(401, "a valid key is needed: send Authorization: Bearer <key>", "invalid_api_key")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is over {MAX_BODY_BYTES} bytes; send less at once")


def _bounded(receive: Receive) -> Receive:
    """A body that does not say its length is cut off at the same size."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is over {MAX_BODY_BYTES} bytes; send less at once")
        return message

    return bounded


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())
