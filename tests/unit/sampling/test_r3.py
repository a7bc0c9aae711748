"""R3: replay into collapsed groups, ranking by structural entropy, and what it refuses; see also test_r3_reflection."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, Groups, StateError, Tokens
from verl_plugins.advantage.grpo import grpo_advantage
from verl_plugins.composition import manager
from verl_plugins.reward.structural_entropy import dominance, ranking_reward, structural_entropy
from verl_plugins.sampling.r3 import (
    R3,
    REFLECTIVE,
    collapsed,
    mixed_advantage,
    outcome_reward,
)
from verl_plugins.services import Prompts

EOS, BUDGET, N = 256, 6, 4
CHAIN = [[5.0, *[0.2] * 5], [4.0, *[0.5] * 5], [3.0, *[0.9] * 5], [2.0, *[1.4] * 5]]
"""Entropies of answers of which each dominates all that follow: a lower peak, a higher mean."""
FLAT = [1.0] * 6
FEW = settings(max_examples=50, deadline=None)
CONFIG = {
    "data": {"train_batch_size": 8, "max_prompt_length": 400},
    "actor_rollout_ref": {"rollout": {"n": N}},
}


def make_run(step: int = 1, rows: int = 8, **data) -> FakeRun:
    config = OmegaConf.merge(CONFIG, {"data": data})
    return FakeRun(dataset=FakeDataset(rows), config=config, step=step)


def method(**options) -> R3:
    return R3(R3.Config(**options))


def answers(step: int, groups: dict[int, list[bool]], full: Batch | None = None, **fields) -> Batch:
    """A rolled-out batch: per prompt the verdicts of its answers; wrong ones use up the budget, right ones end."""
    rows = [(prompt, right) for prompt, outcomes in groups.items() for right in outcomes]
    lengths = torch.tensor([3 if right else BUDGET for _, right in rows])
    token = torch.arange(BUDGET)
    mask = token < lengths[:, None]
    last = token == lengths[:, None] - 1
    right = torch.tensor([right for _, right in rows])
    responses = torch.full(mask.shape, 65) + torch.arange(len(rows))[:, None] % 26
    responses[last & right[:, None]] = EOS
    columns = {
        "uid": [f"{prompt}-{step}-0" for prompt, _ in rows],
        "rm_scores": (last & right[:, None]).float(),
        "response_mask": mask,
        "responses": responses * mask,
        "response_lengths": lengths,
        "verdict": right.float(),
        "rollout_log_probs": -torch.rand(mask.shape, generator=torch.Generator().manual_seed(step)),
        "session": list(itertools.chain(*[range(len(outcomes)) for outcomes in groups.values()])),
        REFLECTIVE: [0.0] * len(rows),
        "tokenizer": make_run().tokenizer,
        "budget": BUDGET,
    }
    return Batch.from_tensors(full=full, **{**columns, **fields})


def train_step(plugin: R3, run: FakeRun, groups: dict[int, list[bool]]) -> Batch:
    """All driver stages of a step without reflection; the batch that was rolled out."""
    batch = answers(run.step, groups)
    plugin.shape_rewards(run, batch)
    plugin.select_rows(run, batch)
    plugin.observe(run, batch)
    return batch


class TestRanking:
    """SERR."""

    @FEW
    @given(st.lists(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=8), min_size=1, max_size=6), st.data())
    def test_against_loops(self, rows, data):
        p = data.draw(st.floats(0.05, 1.0))
        mask = torch.zeros(len(rows), 8, dtype=torch.bool)
        entropy = torch.full((len(rows), 8), 9.0)
        for place, row in enumerate(rows):
            mask[place, : len(row)] = True
            entropy[place, : len(row)] = torch.tensor(row)
        peak, mean = structural_entropy(entropy, mask, p)
        for place, row in enumerate(rows):
            k = max(1, int(p * len(row)))
            assert float(peak[place]) == pytest.approx(np.mean(sorted(row)[::-1][:k]))
            assert float(mean[place]) == pytest.approx(np.mean(row))
        uid = data.draw(st.lists(st.sampled_from("ab"), min_size=len(rows), max_size=len(rows)))
        groups = Groups(uid)
        dominated = dominance(peak, mean, groups)
        expected = [
            sum(uid[j] == uid[i] and peak[i] > peak[j] and mean[i] < mean[j] for j in range(len(rows)))
            for i in range(len(rows))
        ]
        assert dominated.tolist() == expected

    @FEW
    @given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
    def test_rungs_are_shared(self, dominated):
        """What is paid sums to the ladder, equal rows are paid equally, and more dominance is never paid less."""
        n, s = len(dominated), torch.tensor(dominated)
        paid = ranking_reward(s, Groups(["a"] * n), 0.5)
        assert float(paid.sum()) == pytest.approx(0.5 * n / 2)
        for i, j in itertools.combinations(range(n), 2):
            assert (s[i] > s[j]) == (paid[i] > paid[j]) and (s[i] == s[j]) == (paid[i] == paid[j])
        stable = ranking_reward(s, Groups(["a"] * n), 0.5, ties="stable")
        order = sorted(range(n), key=lambda row: (-dominated[row], row))
        assert stable[order].tolist() == pytest.approx([0.5 * (1 - k / (n - 1)) for k in range(n)])

    def test_one_alone(self):
        alone, s = Groups(["a", "b", "b", "c"], counted=torch.tensor([True, False, True, False])), torch.zeros(4)
        assert ranking_reward(s, alone, 0.5).tolist() == [0, 0, 0, 0]
        assert ranking_reward(s, alone, 0.5, singleton="max").tolist() == [0.5, 0, 0.5, 0]

    def test_an_empty_response_has_no_entropy(self):
        mask = torch.tensor([[True, True], [False, False]])
        peak, mean = structural_entropy(torch.tensor([[3.0, 1.0], [9.0, 9.0]]), mask, 0.5)
        assert (peak.tolist(), mean.tolist()) == ([3, 0], [2, 0])

    @pytest.mark.parametrize(
        ("groups", "tied", "peak"),
        [
            ([[CHAIN[0], CHAIN[1], CHAIN[2], CHAIN[3]], [FLAT]], 0.0, 3.0),
            ([[CHAIN[0], CHAIN[1]], [FLAT, FLAT]], 0.5, 2.75),
            ([[CHAIN[0]], [CHAIN[1]], [FLAT, FLAT, FLAT]], 0.6, 2.4),
        ],
    )
    def test_what_is_logged(self, groups, tied, peak):
        """Of failures; equal ranks of different groups are no tie."""
        entropy = torch.tensor([row for group in groups for row in group])
        batch = answers(1, {prompt: [False] * len(rows) for prompt, rows in enumerate(groups)}, entropy=entropy)
        method().estimate_advantage(run := make_run(), batch)
        assert run.metrics == pytest.approx(
            {
                "serr_ranked": len(entropy),
                "serr_tie_fraction": tied,
                "peak_entropy_mean": peak,
                "global_entropy_mean": float(entropy.mean()),
            }
        )

    def test_without_its_reward_nothing_is_ranked(self):
        method(r_max=0.0).estimate_advantage(run := make_run(), answers(1, {0: [False, True]}))
        assert run.metrics == {}


class TestAdvantage:
    """One formula for plain and mixed groups."""

    @FEW
    @given(st.lists(st.sampled_from([0.0, 0.25, 1.5, 2.0]), min_size=4, max_size=4))
    def test_is_grpo_without_replay(self, scores):
        scores, groups = torch.tensor(scores * 2), Groups(["a"] * 4 + ["b"] * 4)
        none = torch.zeros(8, dtype=torch.bool)
        torch.testing.assert_close(mixed_advantage(scores, none, groups, 2.0, 1e-6), grpo_advantage(scores, groups))

    @pytest.mark.parametrize("scope", ["group", "replay_rows"])
    def test_a_single_answer_gets_something_only_beside_a_replayed_one(self, scope):
        scores, replayed = torch.tensor([1.5, 0.0, 1.0]), torch.tensor([False, False, True])
        found = mixed_advantage(scores, replayed, Groups(["a", "b", "b"]), 1.0, 1e-6, scope)
        assert found[0] == 0
        assert found[1:].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-4)

    def test_alpha_damps_only_mixed_groups(self):
        scores, replayed = torch.tensor([0.0, 0, 1, 0, 1]), torch.tensor([False, False, True, False, False])
        groups = Groups(["a", "a", "a", "b", "b"])
        plain = mixed_advantage(scores, replayed, groups, 1.0, 1e-6)
        torch.testing.assert_close(
            mixed_advantage(scores, replayed, groups, 2.0, 1e-6) / plain,
            torch.tensor([0.5, 0.5, 0.5, 1, 1]),
            atol=1e-4,
            rtol=0,
        )
        rows = mixed_advantage(scores, replayed, groups, 2.0, 1e-6, "replay_rows") / plain
        torch.testing.assert_close(rows, torch.tensor([1.0, 1, 0.5, 1, 1]), atol=1e-4, rtol=0)

    def test_shorter_right_answers_are_better(self):
        reward = outcome_reward(torch.tensor([True, True, False, True]), torch.tensor([1, 8, 1, 40]), 16)
        assert reward.tolist() == [1 + 15 / 16, 1.5, 0, 1]

    def test_collapse_is_about_correctness(self):
        wrong, right = collapsed(torch.tensor([True, True, False, False, True]), Groups(list("aabbb")))
        assert right.tolist() == [True, True, False, False, False] and not wrong.any()


class TestReplay:
    """What joins which group."""

    def test_the_other_outcome_of_the_same_prompt_replaces_answers(self):
        plugin, wrong, right = method(), [False] * N, [True] * N
        train_step(plugin, make_run(1), {0: [True, True, True, False], 1: [True] * 3 + [False], 2: wrong})
        run = make_run(2)
        batch = train_step(plugin, run, {0: wrong, 1: right, 2: wrong, 3: wrong})
        added = {new.key: new for new in batch.additions}
        assert sorted(added) == ["0-2-0_4_0", "0-2-0_5_0", "1-2-0_4_0"]
        assert added["0-2-0_4_0"].correct and not added["1-2-0_4_0"].correct
        assert added["0-2-0_4_0"].reward == pytest.approx(2 - 3 / 32768)
        assert added["1-2-0_4_0"].reward == 0
        gone = np.unique(batch.uid[batch.dropped.numpy()], return_counts=True)
        assert dict(zip(*gone, strict=True)) == {"0-2-0": 2, "1-2-0": 1}
        assert run.metrics["replayed_rows"] == 3 and run.metrics["replay_hit_rate"] == 0.5
        assert run.metrics["replay_age_steps"] == 1
        assert (run.metrics["groups_all_wrong"], run.metrics["groups_all_right"]) == (3, 1)

    def test_tokens_and_log_probs_come_back(self):
        plugin = method(replay=1, mix="append")
        first = train_step(plugin, make_run(1), {0: [True, False, False, False]})
        second = train_step(plugin, make_run(2), {0: [False] * N})
        (new,) = second.additions
        assert new.response.tolist() == first.responses[0, :3].tolist()
        np.testing.assert_array_equal(new.rollout_log_probs, first.rollout_log_probs[0, :3].numpy())
        assert not second.dropped.any()

    def test_a_step_never_replays_itself(self):
        """Two draws of one prompt in a step: nothing of the first is known to the second."""
        batch = answers(1, {0: [True, False], 1: [False] * 2})
        batch.uid = np.array(["0-1-0", "0-1-0", "0-1-1", "0-1-1"], dtype=object)
        plugin, run = method(), make_run()
        plugin.select_rows(run, batch)
        assert not batch.additions and run.metrics["replay_hit_rate"] == 0

    def test_at_least_one_answer_of_the_group_stays(self):
        plugin = method(replay=3, capacity=4)
        train_step(plugin, make_run(1), {0: [True, True, True, False]})
        batch = train_step(plugin, make_run(2), {0: [False, False]})
        assert len(batch.additions) == 1 and batch.dropped.sum() == 1

    def test_nothing_is_replayed_when_told_so(self):
        plugin = method(replay=0)
        train_step(plugin, make_run(1), {0: [True, False]})
        batch = train_step(plugin, make_run(2), {0: [False, False]})
        assert not batch.additions and not batch.dropped.any()

    def test_answers_with_tokens_of_a_tool_are_not_stored(self):
        batch = answers(1, {0: [True, False]})
        mask = batch.response_mask.clone()
        mask[0, 1] = False
        batch = answers(1, {0: [True, False]}, response_mask=mask)
        plugin, run = method(), make_run()
        plugin.observe(run, batch)
        assert run.metrics["not_stored"] == 1
        assert plugin.store.facts["correct"].tolist() == [False]

    def test_which_answers_give_way_does_not_depend_on_row_order(self):
        batches = []
        for order in (slice(None), slice(None, None, -1)):
            plugin = method()
            train_step(plugin, make_run(1), {0: [True, True, False, False]})
            batch = answers(2, {0: [False] * N, 1: [True, False, False, False]})
            rows = np.arange(len(batch))[order].copy()
            fields = {
                name: column[rows] for name, column in batch._source.fields.items() if isinstance(column, torch.Tensor)
            }
            batch = Batch.from_tensors(
                uid=batch.uid[rows].tolist(),
                session=batch.session[rows],
                tokenizer=batch._tokenizer,
                budget=BUDGET,
                **fields,
            )
            plugin.select_rows(make_run(2), batch)
            gone = {key for key, dropped in zip(batch.keys, batch.dropped.tolist(), strict=True) if dropped}
            batches.append((gone, [new.key for new in batch.additions]))
        assert batches[0] == batches[1] and len(batches[0][0]) == 2

    def test_the_loss_takes_the_stored_log_probs_if_asked(self):
        plugin, run = method(old_log_probs="stored"), make_run(2)
        full = answers(2, {0: [False] * N})
        full.add(
            0, np.array([65, EOS]), reward=2.0, correct=True, rollout_log_probs=np.array([-0.5, -0.25], np.float32)
        )
        batch = answers(2, {0: [False] * N + [True]}, full=full, old_log_probs=torch.full((5, BUDGET), -7.0))
        assert batch.is_added.tolist() == [False] * 4 + [True]
        plugin.observe(run, batch)
        written = batch.written["old_log_probs"]
        assert (written[:4] == -7).all() and (written[4, 3:] == -7).all()
        torch.testing.assert_close(written[4, :3], batch.rollout_log_probs[4, :3])

    @pytest.mark.parametrize(
        ("advantage", "ratio", "clipped"),
        [
            *[(1.0, 1.3, 1), (1.0, 1.25, 0), (1.0, 0.5, 0)],
            *[(-0.5, 0.75, 1), (-0.5, 0.85, 0), (-0.5, 1.5, 0)],
            (0.0, 1.5, 0),
        ],
    )
    def test_clip_fraction_of_replayed_tokens(self, advantage, ratio, clipped):
        """Beyond the end of the range to which the advantage pushes; the other row would count, and is not replayed."""
        losses, logged = clip_fraction([0.2, 0.28], advantage, [[2.0, 0.1], [ratio, ratio]])
        assert losses.tolist() == [[1, 1], [1, 1]] and logged == {"replay_ratio_clipfrac": clipped}

    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    def test_the_ends_of_the_range_are_not_clipped(self, advantage):
        assert clip_fraction([0.0, 0.0], advantage, [[1.0], [1.0]])[1] == {"replay_ratio_clipfrac": 0}

    def test_an_answer_of_one_token_is_stored(self):
        lengths = torch.tensor([1, 0])
        mask = torch.arange(BUDGET) < lengths[:, None]
        batch = answers(1, {0: [False, False]}, response_mask=mask, response_lengths=lengths)
        plugin, run = method(), make_run()
        plugin.observe(run, batch)
        assert run.metrics["not_stored"] == 1 and len(plugin.store) == 1


def clip_fraction(clip: list[float], advantage: float, ratio: list[list[float]]) -> tuple[torch.Tensor, dict]:
    """Losses of 1 after the hook, and what it logs, of two rows of which the second was replayed."""
    seen, ratio = {}, torch.tensor(ratio)
    tokens = Tokens(
        log_probs=(ratio.log() - 0.5).requires_grad_(),
        old_log_probs=torch.full_like(ratio, -0.5),
        advantages=torch.full_like(ratio, advantage),
        response_mask=torch.ones_like(ratio),
        config=OmegaConf.create({"clip_ratio": 9.0, "clip_ratio_low": clip[0], "clip_ratio_high": clip[1]}),
        extra=lambda name: torch.tensor([0.0, 1.0]),
        log=lambda owner, metrics, reduce: seen.update(metrics),
    )
    wrapper = method().policy_loss(tokens)
    next(wrapper)
    with pytest.raises(StopIteration) as done:
        wrapper.send(torch.ones_like(ratio))
    return done.value.value, seen


@pytest.mark.parametrize("plugins", [["r3", "prompt_augmentation"], ["prompt_augmentation", "r3"]])
def test_what_others_reward_comes_on_top(plugins):
    assert manager.build({name: {} for name in plugins}).of_stage("shape_rewards")[0][0] == "r3"


def test_state_of_another_dataset_is_refused():
    plugin = method()
    train_step(plugin, make_run(1), {0: [True, False]})
    with pytest.raises(StateError, match="8 prompts, the dataset 9"):
        plugin.prepare_prompts(make_run(2, rows=9), Prompts([]))


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        ({}, {"algorithm": {"filter_groups": {"enable": True}}}, "filter_groups"),
        ({}, {"algorithm": {"use_kl_in_reward": True}}, "algorithm.use_kl_in_reward=true"),
        ({}, {"distillation": {"enabled": True}}, "distillation.enabled=false"),
        ({"replay": 4}, {}, "plugins.r3.replay=4 would replace whole groups"),
    ],
)
def test_refused_settings(options, changes, told):
    with pytest.raises(CompositionError, match=told):
        method(**options).check(OmegaConf.merge(CONFIG, changes))


@pytest.mark.parametrize("options", [{"replay": 3}, {"replay": 4, "mix": "append"}])
def test_accepted_settings(options):
    method(**options).check(OmegaConf.create(CONFIG))
