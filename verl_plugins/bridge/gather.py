"""Many small calls made at about the same time, sent as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

QUIET_SECONDS = 0.003
MAX_ROUNDS = 20


class Gather:
    """An async function of one item that waits until no further call has come for a moment, then sends all of them.

    `send` takes the items and returns one result each; a result that is an exception is raised to its caller. Every
    caller gets something, whatever `send` raises or returns.
    """

    def __init__(self, send: Callable[[list[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._send = send
        self._waiting: list[tuple[Any, asyncio.Future]] = []
        self._tasks: set[asyncio.Task] = set()
        """Under way; the event loop alone would not keep them."""

    async def __call__(self, item: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) == 1:
            task = asyncio.create_task(self._flush())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _flush(self) -> None:
        try:
            await self._until_quiet()
        finally:
            waiting, self._waiting = self._waiting, []
            await self._answer(waiting)

    async def _until_quiet(self) -> None:
        seen, rounds = 0, 0
        while seen != len(self._waiting) and rounds < MAX_ROUNDS:
            seen, rounds = len(self._waiting), rounds + 1
            await asyncio.sleep(QUIET_SECONDS)

    async def _answer(self, waiting: list[tuple[Any, asyncio.Future]]) -> None:
        try:
            results = list(await self._send([item for item, _ in waiting]))
            if len(results) != len(waiting):
                raise RuntimeError(f"{len(results)} answers came for {len(waiting)} questions")
        except BaseException as error:  # also a cancellation: its own callers would wait for ever
            results = [error] * len(waiting)
        for (_, future), result in zip(waiting, results, strict=True):
            if future.done():  # its caller has given up
                continue
            if isinstance(result, BaseException):
                future.set_exception(ordinary(result))
            else:
                future.set_result(result)


def ordinary(error: BaseException) -> Exception:
    """The exception, or one that names it where it would end the task or the event loop of whoever waits."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    named = RuntimeError(f"{type(error).__name__}: {error}")
    named.__cause__ = error
    return named
