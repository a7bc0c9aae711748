"""A checkpoint engine of verl over gloo: weights from the first actor rank to every rollout worker, without a GPU.

verl imports this module in every process that needs it (`checkpoint_engine.custom_backend_module`).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

ENGINE_NAME = "gloo"
Meeting = tuple[str, int, int]
"""Where the processes of a transfer meet: a path and 0, or a host and its port; and the number of the transfer."""


@CheckpointEngineRegistry.register(ENGINE_NAME)
class GlooCheckpointEngine(CheckpointEngine):
    """Rank 0 is the first actor rank, the others are rollout workers; other actor ranks only take part in gathering.

    The group lives for one transfer, so that replicas may come and go. It is no group of `torch.distributed`'s own:
    each process already has its default group there.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, timeout: float = 600.0) -> None:
        self.bucket_size, self.is_master = bucket_size, is_master
        self.timeout = timedelta(seconds=timeout)
        self._server: dist.TCPStore | None = None
        self._store: dist.Store | None = None
        self._group: dist.ProcessGroupGloo | None = None
        self._round = 0

    def prepare(self) -> Meeting | None:
        """Where the group meets; known to the sender only."""
        if not self.is_master:
            return None
        self._round += 1
        host = ray.util.get_node_ip_address().strip("[]")
        if host.startswith("127."):  # all on this machine: a file, since torch's server listens on all interfaces
            return f"{tempfile.gettempdir()}/weights_{os.getpid()}", 0, self._round
        if self._server is None:
            self._server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout)
        return host, self._server.port, self._round

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Arguments of `init_process_group` for each actor rank and each rollout worker."""

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            size, meeting = 1 + rollout_world_size, metadata[0]
            return {"rank": ranks, "world_size": [size] * len(ranks), "meeting": [meeting] * len(ranks)}

        sitting_out = [-1] * (actor_wg_world_size - 1)
        return arguments([0, *sitting_out]), arguments(list(range(1, 1 + rollout_world_size)))

    def init_process_group(self, rank: int, world_size: int, meeting: Meeting) -> None:
        """Meet; a rank below 0 sends and receives nothing."""
        if rank < 0:
            return
        place, port, number = meeting
        if port:
            store = self._server or dist.TCPStore(place, port, is_master=False, timeout=self.timeout)
            self._store = dist.PrefixStore(str(number), store)
        else:
            self._store = dist.FileStore(f"{place}_{number}", world_size)
        self._group = dist.ProcessGroupGloo(self._store, rank, world_size, self.timeout)

    def finalize(self) -> None:
        """Leave the group."""
        self._group = self._store = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Broadcast all weights in buckets; every actor rank goes through them, since they are gathered from all."""
        started, sent = time.perf_counter(), 0
        for names, payload in buckets(weights, self.bucket_size if self._group else 0):
            self._send(names, payload)
            sent += payload.numel()
        if self._group is None:
            return {}
        self._broadcast(torch.zeros(2, dtype=torch.int64))
        return {"weights/megabytes": sent / 2**20, "weights/seconds": time.perf_counter() - started}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """The weights as they arrive."""
        while True:
            sizes = self._broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
            if not sizes[0]:
                return
            names = json.loads(self._broadcast(torch.empty(sizes[0], dtype=torch.uint8)).numpy().tobytes())
            payload = self._broadcast(torch.empty(sizes[1], dtype=torch.uint8))
            for weight in unpacked(names, payload):
                yield weight

    def _send(self, names: list[list[Any]], payload: torch.Tensor) -> None:
        head = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([head.numel(), payload.numel()], dtype=torch.int64))
        self._broadcast(head)
        self._broadcast(payload)

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._group.broadcast(tensor, 0).wait()
        return tensor


def buckets(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[tuple[list[list[Any]], torch.Tensor]]:
    """Name, shape and dtype of weights, and their bytes, joined up to `limit`; with 0 they are walked through only."""
    names: list[list[Any]] = []
    parts: list[torch.Tensor] = []
    for name, tensor in weights:
        if not limit:
            continue
        names.append([name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])
        parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
        if sum(part.numel() for part in parts) >= limit:
            yield names, torch.cat(parts)
            names, parts = [], []
    if names:
        yield names, torch.cat(parts)


def unpacked(names: list[list[Any]], payload: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of one bucket."""
    offset = 0
    for name, shape, kind in names:
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, payload[offset : offset + size].clone().view(dtype).view(shape)  # a copy is aligned
        offset += size
