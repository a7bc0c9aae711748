"""The gloo checkpoint engine: weights of any type arrive as they were sent, in buckets, at every rollout worker."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.checkpoint_engine.base import CheckpointEngineRegistry

from verl_plugins.cpu.weights import ENGINE_NAME, GlooCheckpointEngine, buckets, unpacked

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def some_weights(shapes: list[tuple[int, ...]]) -> list[tuple[str, torch.Tensor]]:
    kinds = [DTYPES[place % len(DTYPES)] for place in range(len(shapes))]
    return [
        (f"layer.{place}", (torch.arange(torch.Size(shape).numel()) % 2 + place).view(shape).to(kind))
        for place, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=9),
    limit=st.integers(1, 200),
)
def test_buckets_hold_all_weights_as_they_were(shapes, limit):
    sent = some_weights(shapes)
    arrived = [weight for names, payload in buckets(sent, limit) for weight in unpacked(names, payload)]
    assert [name for name, _ in arrived] == [name for name, _ in sent]
    for (_, one), (_, other) in zip(sent, arrived, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_limit_of_nothing_only_walks_through():
    walked = []
    weights = ((name, walked.append(name) or tensor) for name, tensor in some_weights([(2,), (3,)]))
    assert list(buckets(weights, 0)) == [] and walked == ["layer.0", "layer.1"]


def test_weights_of_a_view_are_sent_in_its_order():
    matrix = torch.arange(6.0).view(2, 3).T
    ((names, payload),) = buckets([("w", matrix)], 1 << 20)
    ((_, arrived),) = unpacked(names, payload)
    assert torch.equal(arrived, matrix)


def test_ranks_of_the_actor_and_of_the_rollout():
    actor, rollout = GlooCheckpointEngine.build_topology(2, 3, [("x", 0, 1), None])
    assert actor == {"rank": [0, -1], "world_size": [4, 4], "meeting": [("x", 0, 1)] * 2}
    assert rollout == {"rank": [1, 2, 3], "world_size": [4, 4, 4], "meeting": [("x", 0, 1)] * 3}


def test_verl_knows_it():
    assert CheckpointEngineRegistry.get(ENGINE_NAME) is GlooCheckpointEngine


def received(rank: int, meeting: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    engine = GlooCheckpointEngine(bucket_size=64)
    for number in (1, 2):
        engine.init_process_group(rank, 3, (*meeting[:2], number))

        async def take() -> list[tuple[str, list[Any]]]:
            return [(name, tensor.tolist()) async for name, tensor in engine.receive_weights()]

        answers.put((rank, number, asyncio.run(take())))
        engine.finalize()


@pytest.fixture
def meeting(tmp_path: Path) -> tuple[str, int, int]:
    return f"{tmp_path}/weights", 0, 1


def test_two_transfers_to_two_servers(meeting):
    """Each in a process of its own; the second transfer sends other weights."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    servers = [context.Process(target=received, args=(rank, meeting, answers)) for rank in (1, 2)]
    for server in servers:
        server.start()
    sender, idle = GlooCheckpointEngine(bucket_size=64, is_master=True), GlooCheckpointEngine(bucket_size=64)
    shapes = [(3, 4), (7,), (2, 2, 2)]
    for number in (1, 2):
        weights = [(name, tensor + number) for name, tensor in some_weights(shapes) if tensor.dtype != torch.bool]
        sender.init_process_group(0, 3, (*meeting[:2], number))
        idle.init_process_group(-1, 3, (*meeting[:2], number))
        told = asyncio.run(sender.send_weights(iter(weights)))
        assert told["weights/megabytes"] * 2**20 == sum(tensor.nbytes for _, tensor in weights)
        assert asyncio.run(idle.send_weights(iter(weights))) == {}
        sender.finalize()
    found = {}
    for _ in range(4):
        rank, number, weights = answers.get(timeout=60)
        found[rank, number] = weights
    for server in servers:
        server.join(timeout=60)
    expected = {
        number: [(name, (tensor + number).tolist()) for name, tensor in some_weights(shapes)] for number in (1, 2)
    }
    assert found == {(rank, number): expected[number] for rank in (1, 2) for number in (1, 2)}
