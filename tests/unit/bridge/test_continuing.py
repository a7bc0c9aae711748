"""A plugin continues a response from its middle, and gives a row fields of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import EOS, Servers, answer, prompt

from verl_plugins import Plugin, hookimpl
from verl_plugins.diagnostics.budget import Account


class Continues(Plugin):
    """Rolls out once, twice goes on after its first token, and publishes what came of it."""

    name = "continues"
    seen: list[Any]
    prefix: tuple[int, ...] = (7,)
    options: dict[str, Any]

    @hookimpl
    async def rollout_group(self, run: Any, prompt: Any, sample: Any) -> Any:
        (whole,) = await sample(1)
        parts = await asyncio.gather(*[sample(1, prefix=list(self.prefix), **self.options) for _ in range(2)])
        self.seen = [whole, *[one for part in parts for one in part]]
        self.account = sample.__self__.account
        for number, rollout in enumerate(self.seen):
            rollout.fields = {"place": number, "values": [0.5] * number}
        return self.seen


@pytest.fixture
def continued(agents):
    """Answers 7, 8, end; after a prefix 9, end."""

    def run(**options: Any) -> tuple[Any, Servers, Any, Any]:
        start: list[int] = []

        def give(ids: Any, _: int) -> Any:
            start[:] = start or list(ids)
            return answer([7, 8, EOS] if len(ids) == len(start) else [9, EOS])

        plugin, servers = Continues(None), Servers(give)
        plugin.options = options.pop("options", {})
        plugin.prefix = options.pop("prefix", plugin.prefix)
        worker = agents.worker(servers, *options.pop("overrides", ()), plugins=[plugin])
        failures = agents.generate(worker, prompt())
        return plugin, servers, agents.queue, failures

    return run


def test_the_server_reads_prompt_and_prefix(continued):
    _, servers, _, failures = continued()
    first, *others = [request["prompt_ids"] for request in servers.asked]
    assert others == [[*first, 7]] * 2 and not failures.causes


def test_prefix_and_what_is_new_are_one_response(continued):
    plugin, _, queue, _ = continued()
    whole, one, other = plugin.seen
    assert whole.response_ids == [7, 8, EOS] and whole.mask == [1, 1, 1]
    assert one.response_ids == other.response_ids == [7, 9, EOS]
    assert one.mask == [0, 1, 1] and one.log_probs == [0.0, -0.5, -0.5]
    rows = [queue.rows[f"0-1-0_{session}_0"] for session in range(3)]
    assert [row["responses"].tolist() for row in rows] == [[7, 8, EOS], [7, 9, EOS], [7, 9, EOS]]
    assert [row["response_mask"].tolist() for row in rows] == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert rows[0]["prompts"].tolist() == rows[1]["prompts"].tolist()


def test_only_what_is_new_is_counted(continued):
    assert continued()[0].account.take() == Account(3, 3 + 2 + 2)


def test_fields_travel_with_the_row(continued):
    _, _, queue, _ = continued()
    fields = [queue.rows[f"0-1-0_{session}_0"]["extra_fields"] for session in range(3)]
    assert [(field["place"], field["values"]) for field in fields] == [(0, []), (1, [0.5]), (2, [0.5, 0.5])]


def test_a_continuation_may_have_what_room_is_left(continued):
    _, servers, _, _ = continued(overrides=["data.max_response_length=8"])
    assert [request.get("max_tokens") for request in servers.asked[1:]] == [7, 7]


def test_or_less(continued):
    plugin, servers, _, _ = continued(options={"max_tokens": 2})
    assert [request["max_tokens"] for request in servers.asked[1:]] == [2, 2]
    assert not plugin.seen[1].truncated  # it ended by itself


@pytest.mark.parametrize(
    "options", [{"prefix": (7,) * 8}, {"options": {"max_tokens": 8}}], ids=["no room", "more than there is"]
)
def test_without_room_it_is_refused(continued, options):
    _, _, queue, failures = continued(overrides=["data.max_response_length=8"], **options)
    assert "leave room for" in failures.sentence() and queue.status["0-1-0"] == "failure"
