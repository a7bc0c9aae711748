"""verl's clients of a single Transformers server, without a load balancer: requests made together travel together."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from verl_plugins.bridge.gather import Gather


class _Batched:
    """The server's `generate.remote(…)`, calls made together in one message."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._gather = Gather(self._send)

    @property
    def generate(self) -> _Batched:
        return self

    def remote(self, **request: Any) -> Awaitable[Any]:
        return self._gather(request)

    async def _send(self, requests: list[dict[str, Any]]) -> list[Any]:
        return await self._server.generate_many.remote(requests)


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
