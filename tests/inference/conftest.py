"""A small HTTP server that answers chat completions, or passes them on, and breaks some on the way."""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

HOPELESS, UNWELCOME = "hopeless", "unwelcome"  # words in a speech: every try fails; the request is refused for good


class Chat:
    """An endpoint at `url`; `fault(n)` names what happens to its n-th request: see `_break`."""

    def __init__(
        self, fault: Callable[[int], str | None] = lambda n: None, upstream: str | None = None, by_try: bool = False
    ) -> None:
        """`by_try`: n counts the tries of one speech, from a start of its own, so that chance plays no part."""
        self.fault, self.upstream, self.by_try = fault, upstream, by_try
        self.seen: Counter[str] = Counter()  # requests, by what the client said
        self.faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.answer = "I hear you. What would help you today?"
        self.tokens = (20, 10)
        self._count = 0
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            headers = {name.lower(): value for name, value in headers.items()}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.keys.add(headers.get("authorization", ""))
            await self._reply(body, writer)
            if body.get("stall"):
                await reader.read()  # until the client has had enough
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _reply(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        said = body["messages"][-1]["content"]
        self.seen[said] += 1
        self.bodies.append(dict(body))
        number, self._count = self._count, self._count + 1
        if self.by_try:
            number = zlib.crc32(said.encode()) + self.seen[said]
        fault = "500" if HOPELESS in said else "400" if UNWELCOME in said else self.fault(number)
        if fault is None:
            status, answer = await self._answer(body)
            _write(writer, status, answer)
        else:
            self.faults[fault] += 1
            await self._break(fault, body, writer)
        await writer.drain()

    async def _answer(self, body: dict[str, Any]) -> tuple[int, bytes]:
        if self.upstream:
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{self.upstream}/chat/completions", json=body)
            return answer.status_code, answer.content
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.002)
        self.at_once -= 1
        message = {"role": "assistant", "content": self.answer}
        usage = dict(zip(("prompt_tokens", "completion_tokens"), self.tokens, strict=True))
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()

    async def _break(self, fault: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if fault.isdigit():
            _write(writer, int(fault), b'{"error": {"message": "no", "code": "none"}}', "Retry-After: 0.05\r\n")
        elif fault == "garbage":
            _write(writer, 200, b"<html>busy</html>")
        elif fault == "empty":
            _write(writer, 200, b'{"choices": []}')
        else:
            _, whole = await self._answer(body)
            _write(writer, 200, whole[: len(whole) // 2], length=len(whole))
            body["stall"] = fault == "slow"


def _write(writer: asyncio.StreamWriter, status: int, body: bytes, extra: str = "", length: int | None = None) -> None:
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {size}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)


@pytest.fixture
def chat() -> Iterator[Callable[..., Chat]]:
    """Start endpoints: `chat(fault, upstream)`."""
    made: list[Chat] = []

    def start(*args: Any, **kwargs: Any) -> Chat:
        made.append(Chat(*args, **kwargs))
        return made[-1]

    yield start
    for server in made:
        server.close()
