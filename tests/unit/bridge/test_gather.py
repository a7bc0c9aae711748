"""Many small calls made at about the same time are sent as one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from verl_plugins.bridge import gather
from verl_plugins.bridge.gather import Gather


class Sent:
    """Remembers what was sent; the answer to an item is the item doubled."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    async def __call__(self, items: list[Any]) -> list[Any]:
        self.calls.append(items)
        return [ValueError(f"{item} is odd") if item % 2 else 2 * item for item in items]


class TestGather:
    """Calls of one moment share a message, and each gets its own answer."""

    def test_calls_made_together_are_one_message_in_their_order(self) -> None:
        sent = Sent()

        async def run() -> list[int]:
            call = Gather(sent)
            return await asyncio.gather(*[call(item) for item in (4, 2, 8)])

        assert asyncio.run(run()) == [8, 4, 16]
        assert sent.calls == [[4, 2, 8]]

    def test_calls_that_keep_coming_join(self) -> None:
        sent = Sent()

        async def run() -> list[int]:
            call = Gather(sent)

            async def later(item: int, rounds: int) -> int:
                for _ in range(rounds):
                    await asyncio.sleep(0)
                return await call(item)

            return await asyncio.gather(*[later(2 * number, number) for number in range(5)])

        assert asyncio.run(run()) == [0, 4, 8, 12, 16]
        assert len(sent.calls) == 1

    def test_an_answer_is_not_delayed_for_ever_by_further_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gather, "QUIET_SECONDS", 0.002)
        monkeypatch.setattr(gather, "MAX_ROUNDS", 3)
        sent = Sent()

        async def run() -> None:
            call = Gather(sent)
            first = asyncio.ensure_future(call(0))
            others = []
            while not first.done():
                others.append(asyncio.ensure_future(call(2)))
                await asyncio.sleep(0.0005)
            await asyncio.gather(*others)

        asyncio.run(asyncio.wait_for(run(), 5))
        assert len(sent.calls) >= 2

    def test_calls_made_later_are_a_message_of_their_own(self) -> None:
        sent = Sent()

        async def run() -> list[int]:
            call = Gather(sent)
            return [await call(2), await call(4)]

        assert asyncio.run(run()) == [4, 8]
        assert sent.calls == [[2], [4]]

    def test_an_item_that_fails_does_not_fail_the_others(self) -> None:
        async def run() -> list[Any]:
            call = Gather(Sent())
            return await asyncio.gather(*[call(item) for item in (2, 3, 4)], return_exceptions=True)

        two, three, four = asyncio.run(run())
        assert (two, str(three), four) == (4, "3 is odd", 8)

    def test_a_message_that_fails_fails_all_its_calls_and_not_the_next(self) -> None:
        broken = iter([True, False])

        async def send(items: list[int]) -> list[int]:
            if next(broken):
                raise ConnectionError("lost")
            return items

        async def run() -> list[Any]:
            call = Gather(send)
            failed = await asyncio.gather(call(1), call(2), return_exceptions=True)
            return [*failed, await call(3)]

        one, two, three = asyncio.run(run())
        assert isinstance(one, ConnectionError) and isinstance(two, ConnectionError)
        assert three == 3

    def test_a_caller_that_gave_up_does_not_fail_the_others(self) -> None:
        sent = Sent()

        async def run() -> int:
            call = Gather(sent)
            gone = asyncio.ensure_future(call(2))
            await asyncio.sleep(0)
            other = asyncio.ensure_future(call(4))
            gone.cancel()
            return await asyncio.wait_for(other, 5)

        assert asyncio.run(run()) == 8
