"""Asking a deployment: admission, deadlines, and a second try where a replica dies before its first word.

Admission is counted here, exactly: Serve's own queue refuses requests of a burst that it could have taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from psycho.serving.protocol import ApiError, Delta, Refused

_TRIES = 3


class Admission:
    """Lets `slots` requests through at once, in order, and `queued` wait; refuses the rest with 429."""

    def __init__(self, slots: int, queued: int) -> None:
        self._room = slots + queued
        self._slots = asyncio.Semaphore(slots)

    @asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[None]:
        if self._room <= 0:
            raise ApiError(429, "all places in the queue are taken; try again in a moment", "queue_full")
        self._room -= 1
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._slots.acquire()
            except TimeoutError:
                raise _timed_out() from None
            try:
                yield
            finally:
                self._slots.release()
        finally:
            self._room += 1


async def call(method: Any, deadline: float, *arguments: Any) -> Any:
    """Ask a deployment for one value.

    Raises:
        ApiError: it refused, was too slow, or is not there.
    """
    for tries_left in reversed(range(_TRIES)):
        response = method.remote(*arguments)
        try:
            async with asyncio.timeout_at(deadline):
                value = await response
        except (TimeoutError, asyncio.CancelledError) as error:
            response.cancel()
            if isinstance(error, TimeoutError):
                raise _timed_out() from None
            raise
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            _raise_unless_worth_a_retry(error, tries_left)
        else:
            return _checked(value)
    raise AssertionError("unreachable")


async def stream(method: Any, deadline: float, *arguments: Any) -> AsyncGenerator[Delta, None]:
    """Ask a streaming deployment; raises as `call` does, at the first part or later."""
    for tries_left in reversed(range(_TRIES)):
        response = method.remote(*arguments)
        begun = finished = False
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    value = await anext(response)
                part = _checked(value)
                begun = True
                yield part
        except StopAsyncIteration:
            finished = True
            return
        except TimeoutError:
            raise _timed_out() from None
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            _raise_unless_worth_a_retry(error, 0 if begun else tries_left)
        finally:
            if not finished:
                response.cancel()


def _raise_unless_worth_a_retry(error: Exception, tries_left: int) -> None:
    if isinstance(error, BackPressureError):
        raise ApiError(429, "the model's queue is full; try again in a moment", "queue_full") from None
    if isinstance(error, DeploymentUnavailableError) or not tries_left:
        raise ApiError(503, "the model is restarting; try again in a moment", "unavailable") from None


def _checked(value: Any) -> Any:
    if isinstance(value, Refused):
        raise ApiError(value.status, value.message, value.code, value.param)
    return value


def _timed_out() -> ApiError:
    return ApiError(504, "the answer took longer than serving.request_timeout_s", "timeout")
