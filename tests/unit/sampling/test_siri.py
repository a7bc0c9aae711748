"""SIRI: the budget of every step, and what is said of responses under a moving one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pluggy
import pytest
import torch
from fakes import FakeRun
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, hookspecs
from verl_plugins.sampling.siri import Siri, is_expanding, length_budget
from verl_plugins.services import Prompt, Prompts

SHAPES = ("cosine", "stair", "stair-cosine")
END, OTHER = 2, 7
CYCLES = st.integers(2, 700)
BOUNDS = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)).map(sorted)


def method(**options) -> Siri:
    return Siri(Siri.Config(**options))


def config(longest=16, **changes):
    """The settings of verl that the method reads."""
    base = {
        "data": {"max_response_length": longest},
        "actor_rollout_ref": {
            "rollout": {"multi_turn": {"enable": False}, "agent": {"default_agent_loop": "single_turn_agent"}}
        },
    }
    whole = OmegaConf.create(base)
    for key, value in changes.items():
        OmegaConf.update(whole, key.replace("__", "."), value)
    return whole


def drawn(plugin: Siri, step: int, longest=16, rows=({},)) -> tuple[list[int | None], dict]:
    """Budgets that a step gives its prompts, and what it logs."""
    run = FakeRun(step=step, config=config(longest))
    prompts = Prompts([Prompt(number, dict(row)) for number, row in enumerate(rows)])
    plugin.prepare_prompts(run, prompts)
    return [prompt.max_tokens for prompt in prompts], run.metrics


class TestSchedule:
    """The three shapes."""

    @given(st.sampled_from(SHAPES), CYCLES, BOUNDS, st.integers(0, 5000))
    def test_bounds_and_period(self, shape, cycle, bounds, t):
        low, high = bounds
        here = length_budget(t, shape, cycle, high, low)
        assert low - 1e-6 <= here <= high + 1e-6
        assert here == pytest.approx(length_budget(t + 3 * cycle, shape, cycle, high, low), rel=1e-9)

    @given(CYCLES, BOUNDS, st.integers(0, 2000))
    def test_cosine_is_the_papers_formula(self, cycle, bounds, t):
        low, high = bounds
        expected = (high + low) / 2 + (high - low) / 2 * math.cos(2 * math.pi * t / cycle)
        assert length_budget(t, "cosine", cycle, high, low) == pytest.approx(expected, rel=1e-9, abs=1e-6)

    @given(CYCLES, BOUNDS, st.integers(0, 2000))
    def test_stair_cosine_is_the_papers_formula(self, cycle, bounds, t):
        low, high = bounds
        p, middle, swing = 2 * math.pi * (t % cycle) / cycle, (high + low) / 2, (high - low) / 2
        quarter = math.pi / 4
        if p < quarter or p >= 7 * quarter:
            expected = high
        elif p < 3 * quarter:
            expected = middle + swing * math.cos(2 * (p - quarter))
        elif p < 5 * quarter:
            expected = low
        else:
            expected = middle + swing * math.cos(2 * (p - 3 * quarter))
        assert length_budget(t, "stair-cosine", cycle, high, low) == pytest.approx(expected, rel=1e-9, abs=1e-4)

    @given(CYCLES, BOUNDS, st.integers(0, 2000))
    def test_stair_is_narrow_in_compression_and_wide_in_expansion(self, cycle, bounds, t):
        low, high = bounds
        expanding = t % cycle >= cycle / 2
        assert is_expanding(t, cycle) == expanding
        assert length_budget(t, "stair", cycle, high, low) == (high if expanding else low)

    @given(st.integers(1, 300), BOUNDS, st.integers(0, 2000))
    def test_cosine_falls_in_compression_and_rises_in_expansion(self, half, bounds, t):
        low, high = bounds
        change = length_budget(t + 1, "cosine", 2 * half, high, low) - length_budget(t, "cosine", 2 * half, high, low)
        assert change * (1 if is_expanding(t, 2 * half) else -1) >= -1e-6


class TestPrompts:
    """Budgets of draws: from step 1 on, which is t = 0."""

    def test_first_step_has_the_widest(self):
        budgets, logged = drawn(method(cycle_length=4, max_length=12, min_length=2), step=1, rows=[{}, {}])
        assert budgets == [12, 12]
        assert (logged["max_length"], logged["phase"], logged["cycle_index"]) == (12, 0, 0)

    def test_a_cycle(self):
        plugin = method(cycle_length=4, max_length=12, min_length=2)
        steps = [drawn(plugin, step) for step in range(1, 6)]
        assert [budgets for budgets, _ in steps] == [[12], [7], [2], [7], [12]]
        assert [(logged["phase"], logged["cycle_index"]) for _, logged in steps] == [
            (0, 0),
            (0, 0),
            (1, 0),
            (1, 0),
            (0, 1),
        ]

    @given(st.sampled_from(SHAPES), CYCLES, st.integers(1, 3000))
    def test_a_resumed_run_goes_on_in_its_phase(self, shape, cycle, step):
        running = method(scheduler=shape, cycle_length=cycle)
        for before in range(max(step - 3, 1), step):
            drawn(running, before, 4096)
        resumed = method(scheduler=shape, cycle_length=cycle)
        resumed.load_state_dict(running.state_dict())
        assert drawn(resumed, step, 4096) == drawn(running, step, 4096)

    def test_default_bounds(self):
        plugin = method(cycle_length=2)
        for step, longest, budget in ((1, 16, 16), (2, 16, 8), (2, 7, 3), (2, 1, 1)):
            assert drawn(plugin, step, longest)[0] == [budget]

    def test_several_turns_are_refused(self, sentence):
        with pytest.raises(DataError) as error:
            drawn(method(), 1, rows=[{"agent_name": "single_turn_agent"}, {"agent_name": "tool_agent"}])
        sentence(error.value, "prompt 1", "'tool_agent'")


def finished(caps, wanted, correct, uid=None, text=None, longest=16) -> Batch:
    """Responses that would have `wanted` tokens, stopped at their caps."""
    caps, wanted = torch.tensor(caps), torch.tensor(wanted)
    lengths = torch.minimum(caps, wanted)
    responses = torch.full((len(caps), int(lengths.max())), OTHER)
    ended = (wanted <= caps).nonzero()[:, 0]
    responses[ended, lengths[ended] - 1] = END
    rewards = torch.zeros(responses.shape).scatter_(1, lengths[:, None] - 1, torch.tensor(correct)[:, None].float())
    words = text or ["x"] * len(caps)
    return Batch.from_tensors(
        uid=uid or [f"{row // 2}-1-0" for row in range(len(caps))],
        rm_scores=rewards,
        response_mask=torch.arange(responses.shape[1]) < lengths[:, None],
        responses=responses,
        response_lengths=lengths,
        __max_tokens__=caps.tolist(),
        budget=longest,
        tokenizer=SimpleNamespace(eos_token_id=END, batch_decode=lambda ids, **_: words),
    )


class TestOutcomes:
    """What is logged of responses, each judged by its own budget."""

    def test_metrics(self):
        batch = finished([4, 4, 8, 8], [4, 5, 5, 9], [1, 0, 1, 1])
        run = FakeRun()
        method().observe(run, batch)
        assert run.metrics == pytest.approx(
            {
                "budget_min": 4,
                "budget_max": 8,
                "truncated_frac": 0.5,
                "mean_length_over_cap": (1 + 1 + 5 / 8 + 1) / 4,
                "no_signal_rows": 0.5,
                "all_truncated_rows": 0,
                "accuracy_truncated": 0.5,
                "accuracy_finished": 1,
            }
        )

    def test_outputs_and_scores_that_were_shaped(self):
        """What gives no signal is a group of equal scores, whatever the verifier said."""
        run, batch = FakeRun(), finished([4] * 4, [3, 9, 2, 3], [1, 0, 1, 0], uid=["1-1-0"] * 2 + ["2-1-0"] * 2)
        batch.correct  # noqa: B018  before the rewards are shaped
        batch.rewards = torch.tensor([1.0, 1.0, 2.0, 1.0])
        method().observe(run, batch)
        assert run.metrics["no_signal_rows"] == 0.5
        assert (run.metrics["accuracy_truncated"], run.metrics["accuracy_finished"]) == (0, pytest.approx(2 / 3))
        assert run.metrics["mean_length_over_cap"] == pytest.approx((3 / 4 + 1 + 2 / 4 + 3 / 4) / 4)
        assert (run.metrics["truncated_frac"], run.metrics["all_truncated_rows"]) == (0.25, 0)

    def test_a_group_cut_off_as_a_whole(self):
        run = FakeRun()
        method().observe(run, finished([2] * 6, [9, 9, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1]))
        assert run.metrics["all_truncated_rows"] == pytest.approx(2 / 6)
        assert run.metrics["no_signal_rows"] == pytest.approx(4 / 6)

    @pytest.mark.parametrize(("wanted", "absent"), [([9, 9], "accuracy_finished"), ([1, 2], "accuracy_truncated")])
    def test_no_accuracy_of_nobody(self, wanted, absent):
        run = FakeRun()
        method().observe(run, finished([3, 3], wanted, [0, 1]))
        assert absent not in run.metrics

    def test_rewards_stay(self):
        batch = finished([4, 4], [4, 9], [1, 1])
        method().shape_rewards(FakeRun(), batch)
        assert batch.scores.tolist() == [1, 1]
        assert not batch.written

    def test_thinking_must_end(self):
        batch = finished([4, 4, 4], [4, 9, 9], [1, 1, 1], uid=["1-1-0"] * 3, text=["a</think>5", "a 5", "</think>5"])
        method(require_think_end=True).shape_rewards(FakeRun(), batch)
        assert batch.scores.tolist() == [1, 0, 1]
        assert batch.correct.tolist() == [True, True, True]

    def test_not_closing_is_never_rewarded(self):
        batch = finished([4, 4, 4], [4, 9, 9], [1, 0, 0], uid=["1-1-0"] * 3, text=["a</think>5", "a 5", "</think>4"])
        batch.rewards = 2 * batch.scores - 1
        method(require_think_end=True).shape_rewards(FakeRun(), batch)
        assert batch.scores.tolist() == [1, -1, -1]

    def test_a_tag_that_is_not_in_decoded_text_is_refused(self, sentence):
        run = FakeRun(config=OmegaConf.create({"data": {"max_response_length": 8}}))
        prompts = Prompts([Prompt(0, {})])
        method(require_think_end=True).prepare_prompts(run, prompts)
        run.tokenizer.decode = lambda ids, skip_special_tokens: ""
        method().prepare_prompts(run, prompts)
        with pytest.raises(DataError) as error:
            method(require_think_end=True).prepare_prompts(run, prompts)
        sentence(error.value, "siri: '</think>'", "special token")

    def test_a_rollout_that_ignores_the_budget_is_noticed(self, sentence):
        batch = finished([4, 9, 10], [4, 9, 10], [1, 1, 1])
        batch._source.fields["__max_tokens__"] = [4, 5, 6]
        with pytest.raises(DataError) as error:
            method().shape_rewards(FakeRun(), batch)
        sentence(error.value, "9 tokens", "budget of 5")


class TestCheck:
    """Settings that cannot work."""

    def test_plain_settings(self):
        method().check(config())
        method(max_length=16, min_length=16).check(config())

    @pytest.mark.parametrize(
        ("options", "changes", "named"),
        [
            ({"min_length": 17}, {}, ("min_length=17", "16")),
            ({"max_length": 8, "min_length": 9}, {}, ("min_length=9", "8")),
            ({"max_length": 32}, {}, ("max_length=32", "data.max_response_length=16")),
            ({}, {"reward__reward_kwargs__overlong_buffer_cfg__enable": True}, ("overlong_buffer_cfg.enable=true",)),
            ({}, {"actor_rollout_ref__rollout__multi_turn__enable": True}, ("multi_turn.enable=false",)),
            ({}, {"actor_rollout_ref__rollout__agent__default_agent_loop": "tool_agent"}, ("single_turn_agent",)),
        ],
    )
    def test_refused(self, options, changes, named, sentence):
        with pytest.raises(CompositionError) as error:
            method(**options).check(config(**changes))
        sentence(error.value, *named)


def test_pluggy_calls_it():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(method())
    prompts = Prompts([Prompt(3, {})])
    manager.hook.prepare_prompts(run=FakeRun(config=config(10)), prompts=prompts)
    assert prompts[0].max_tokens == 10
