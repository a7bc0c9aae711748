"""Many small calls made at about the same time, sent as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

QUIET_SECONDS = 0.003
MAX_ROUNDS = 20


class Gather:
    """An async function of one item that waits until no further call has come for a moment, then sends all of them.

    `send` takes the items and returns one result each; a result that is an exception is raised to its caller.
    """

    def __init__(self, send: Callable[[list[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._send = send
        self._waiting: list[tuple[Any, asyncio.Future]] = []
        self._task: asyncio.Task | None = None

    async def __call__(self, item: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) == 1:
            self._task = asyncio.create_task(self._flush())
        return await future

    async def _flush(self) -> None:
        seen, rounds = 0, 0
        while seen != len(self._waiting) and rounds < MAX_ROUNDS:
            seen, rounds = len(self._waiting), rounds + 1
            await asyncio.sleep(QUIET_SECONDS)
        waiting, self._waiting = self._waiting, []
        try:
            results = await self._send([item for item, _ in waiting])
        except Exception as error:
            results = [error] * len(waiting)
        for (_, future), result in zip(waiting, results, strict=True):
            if future.done():  # its caller has given up
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
