"""A response is published as several rows; what counts responses counts it once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from agents import EOS, TOKENIZER, Agents, Servers, answer, prompt

from verl_plugins import Batch, Plugin, Segment, hookimpl
from verl_plugins.bridge.loops import TOOLS
from verl_plugins.bridge.rows import MAX_TOKENS, OFFSET, ROLLOUT_N, TRUNCATED, VERDICT
from verl_plugins.diagnostics.budget import rollout_budget
from verl_plugins.diagnostics.health import group_health, reward_parts

LIMIT = 8


class Splits(Plugin):
    """7 8 is continued twice: by 9 end, and until it is cut off. What both share is published with the first."""

    name = "splits"

    @hookimpl
    async def rollout_group(self, run: Any, prompt: Any, sample: Any) -> Any:
        (begun,) = await sample(1, max_tokens=2)
        found = await asyncio.gather(*[sample(1, prefix=begun.response_ids) for _ in range(2)])
        one, other = sorted([first for (first,) in found], key=lambda rollout: len(rollout.response_ids))
        one.fields = {"whose": "one", "value": 0.0}
        other.fields = {"whose": "other"}
        one.segments = [Segment(begun, 0, 2, {"value": 0.5, "depth": 1}), Segment(one, 2, 4, {"depth": 2})]
        other.segments = [Segment(other, 2, 8, {"value": 0.25, "depth": 2})]
        return [one, other]


async def by_length(data: Any) -> list[dict[str, Any]]:
    """Right are responses that end by themselves."""
    ended = (data.batch["responses"] == EOS).any(1).float().tolist()
    return [{"reward_score": score, "reward_extra_info": {"acc": score, "form": score / 2}} for score in ended]


def servers() -> Servers:
    def give(ids: Any, number: int) -> Any:
        return answer([[7, 8], [9, EOS], [6] * 6][number % 3], "length" if number % 3 != 1 else "stop")

    return Servers(give)


@pytest.fixture
def published(agents: Agents) -> Any:
    def run(*plugins: Plugin, asked: Servers | None = None, **options: Any) -> Any:
        worker = agents.worker(
            asked or servers(), f"data.max_response_length={LIMIT}", plugins=plugins or [Splits(None)], score=by_length
        )
        agents.failures = agents.generate(worker, prompt(), **options)
        return agents.queue

    return run


def opened(queue: Any) -> Batch:
    """The rows as the trainer opens them."""
    keys = sorted(queue.rows)
    rows = [queue.rows[key] for key in keys]
    fields = {}
    for name in set.intersection(*[set(row) for row in rows]):
        values = [row[name] for row in rows]
        if not isinstance(values[0], torch.Tensor):
            fields[name] = values
        elif values[0].dim():
            fields[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        else:
            fields[name] = torch.stack(values)
    for name in ("responses", "prompts"):
        fields[f"{name[:-1]}_lengths"] = torch.tensor([len(row[name]) for row in rows])
    uid, session, turn = zip(*[key.rsplit("_", 2) for key in keys], strict=True)
    fields.pop("uid")
    return Batch.from_tensors(
        uid=uid, session=[*map(int, session)], turn=[*map(int, turn)], tokenizer=TOKENIZER, budget=LIMIT, **fields
    )


class TestRows:
    def test_each_has_its_own_tokens_behind_its_context(self, published: Any) -> None:
        rows = published().rows
        question = rows["0-1-0_0_0"]["prompts"].tolist()
        assert sorted(rows) == ["0-1-0_0_0", "0-1-0_0_1", "0-1-0_1_0"]
        found = [
            (row["prompts"].tolist(), row["responses"].tolist(), row["input_ids"].tolist())
            for row in (rows[key] for key in sorted(rows))
        ]
        parts = [([], [7, 8]), ([7, 8], [9, EOS]), ([7, 8], [6] * 6)]
        assert found == [([*question, *a], b, [*question, *a, *b]) for a, b in parts]
        for row in rows.values():
            assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1] * len(row["responses"])
            assert row["rollout_log_probs"].tolist() == [-0.5] * len(row["responses"])
            assert row["position_ids"].tolist() == list(range(len(row["input_ids"])))

    def test_a_row_has_what_is_known_of_its_response(self, published: Any) -> None:
        rows = published().rows
        known = [
            [row[name].item() for name in (OFFSET, VERDICT, TRUNCATED, ROLLOUT_N, MAX_TOKENS)]
            for row in (rows[key] for key in sorted(rows))
        ]
        assert known == [[0, 1, 0, 2, LIMIT], [2, 1, 0, 2, LIMIT], [2, 0, 1, 2, LIMIT]]
        assert [rows[key]["rm_scores"].tolist() for key in sorted(rows)] == [[0, 1], [0, 1], [0] * 6]

    def test_fields_of_the_response_and_of_the_segment(self, published: Any) -> None:
        batch = opened(published())
        assert batch.extra("whose") == ["one", "one", "other"]
        assert batch.extra("value").tolist() == [0.5, 0, 0.25] and batch.extra("depth").tolist() == [1, 2, 2]

    def test_an_answer_that_was_begun_and_ended_at_once(self, published: Any, agents: Agents) -> None:
        """Nothing came after the prefix: the row that stands for the response has one token that nobody generated."""
        asked = Servers(lambda ids, number: answer([[7, 8], [], [6, EOS]][number % 3]))

        class Ends(Splits):
            @hookimpl
            async def rollout_group(self, run: Any, prompt: Any, sample: Any) -> Any:
                (begun,) = await sample(1, max_tokens=2)
                (ended,) = await sample(1, prefix=begun.response_ids)
                ended.segments = [Segment(begun, 0, 2), Segment(ended, 2, 2)]
                return [ended]

        rows = published(Ends(None), asked=asked).rows
        last = rows["0-1-0_0_1"]
        assert (last["responses"].tolist(), last["response_mask"].tolist()) == ([EOS], [0])
        assert last["rollout_log_probs"].tolist() == [0] and rows["0-1-0_0_0"]["responses"].tolist() == [7, 8]

    def test_validation_knows_no_segments(self, published: Any) -> None:
        rows = published(validate=True).rows
        assert rows and all(row[OFFSET] == 0 and row["prompts"][-1] != 8 for row in rows.values())

    def test_a_conversation_of_several_outputs_is_not_published_in_segments(
        self, agents: Agents, published: Any
    ) -> None:
        from verl_plugins.bridge.loops import SingleTurn

        class Twice(SingleTurn):
            async def run(self, *args: Any, **kwargs: Any) -> Any:
                one = await super().run(*args, **kwargs)
                return [one, one.model_copy(deep=True)]

        class Cuts(Plugin):
            name = "cuts"

            @hookimpl
            async def rollout_group(self, run: Any, prompt: Any, sample: Any) -> Any:
                (one,) = await sample(1)
                one.segments = [Segment(one, 0, 1), Segment(one, 1, 2)]
                return [one]

        agents.register("twice", Twice)
        worker = agents.worker(servers(), plugins=[Cuts(None)], score=by_length)
        failures = agents.generate(worker, prompt(agent_name="twice"))
        assert "2 outputs" in failures.sentence() and agents.queue.status == {"0-1-0": "failure"}


class TestCountedOnce:
    """What is said of the responses of a group is said of two, not of three rows."""

    def test_groups(self, published: Any) -> None:
        batch = opened(published())
        assert batch.groups.count().tolist() == [2, 2, 2] and batch.groups.mean(batch.scores).tolist() == [0.5] * 3
        assert batch.scores.tolist() == [1, 1, 0] and batch.is_last.tolist() == [False, True, True]

    def test_health(self, published: Any) -> None:
        found = group_health(opened(published()))
        assert found == {
            "health/reward": 0.5,
            "health/accuracy": 0.5,
            "health/length_right": 4,
            "health/length_wrong": 8,
            "health/mixed_groups": 1,
            "health/all_right_groups": 0,
            "health/all_wrong_groups": 0,
            "health/groups_off_size": 0,
            "health/truncated": 0.5,
            "health/generated_tokens": 2 + 2 + 6,
        }

    def test_reward_and_cost(self, published: Any) -> None:
        from verl_plugins.diagnostics.budget import Account

        batch = opened(published())
        assert reward_parts(batch)["reward/form"] == 0.25
        cost = rollout_budget(batch, Account())
        assert (cost["rollout/responses"], cost["rollout/tokens"]) == (3, 2 + 2 + 6)

    def test_the_text_is_the_response_s(self, published: Any) -> None:
        batch = opened(published())
        said = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in ([7, 8], [7, 8, 9], [7, 8] + [6] * 6)]
        assert batch.text == said and batch.ends.tolist() == [2, 4, 8] and batch.lengths.tolist() == [2, 2, 6]


def test_with_tools_the_loop_cannot_continue(published: Any, agents: Agents) -> None:
    worker = agents.worker(servers(), plugins=[Splits(None)], score=by_length)
    failures = agents.generate(worker, prompt(agent_name=TOOLS))
    assert "prefix" in failures.sentence()
