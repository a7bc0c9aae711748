"""verl's clients of a single Transformers server, without a load balancer: requests made together travel together."""

from __future__ import annotations

import asyncio
from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

GATHER_SECONDS = 0.002


class _Batched:
    """The server's `generate.remote(…)`, gathering calls for a moment into one message."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._waiting: list[tuple[dict[str, Any], asyncio.Future]] = []

    @property
    def generate(self) -> _Batched:
        return self

    def remote(self, **request: Any) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((request, future))
        if len(self._waiting) == 1:
            loop.call_later(GATHER_SECONDS, lambda: loop.create_task(self._send()))
        return future

    async def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            results = await self._server.generate_many.remote([request for request, _ in waiting])
        except Exception as error:
            results = [error] * len(waiting)
        for (_, future), result in zip(waiting, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class SingleServer:
    """Mixed into a client of verl: always the same server, reached directly."""

    def __init__(self, config: Any, load_balancer_handle: Any = None, server: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, load_balancer_handle=load_balancer_handle, **kwargs)
        self._batched = _Batched(server)

    async def _acquire_server(self, request_id: str, **_: Any) -> tuple[str, _Batched]:
        return "", self._batched

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Nothing was acquired."""


class SingleServerClient(SingleServer, LLMServerClient):
    """For the `sync` trainer."""


class SingleServerFullyAsyncClient(SingleServer, FullyAsyncLLMServerClient):
    """For trainers that interrupt generation and continue it later."""


CLIENTS = {LLMServerClient: SingleServerClient, FullyAsyncLLMServerClient: SingleServerFullyAsyncClient}
