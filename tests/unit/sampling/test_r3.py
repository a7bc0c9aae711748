"""R3: reflection, replay into collapsed groups, ranking by structural entropy, and what it refuses."""

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
    is_hard,
    mixed_advantage,
    outcome_reward,
)
from verl_plugins.services import Prompt, Prompts

EOS, BUDGET, N = 256, 6, 4
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
        alone, s = Groups(["a", "b", "b"], counted=torch.tensor([True, False, True])), torch.zeros(3)
        assert ranking_reward(s, alone, 0.5).tolist() == [0, 0, 0]
        assert ranking_reward(s, alone, 0.5, singleton="max").tolist() == [0.5, 0, 0.5]


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

    def test_clip_fraction_of_replayed_tokens(self):
        seen = {}
        tokens = Tokens(
            log_probs=torch.tensor([[0.5, 0.5], [0.5, 0.0]], requires_grad=True),
            old_log_probs=torch.zeros(2, 2),
            advantages=torch.ones(2, 2),
            response_mask=torch.ones(2, 2),
            config=OmegaConf.create({"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}),
            extra=lambda name: torch.tensor([0.0, 1.0]),
            log=lambda owner, metrics, reduce: seen.update(metrics),
        )
        wrapper = method().policy_loss(tokens)
        next(wrapper)
        with pytest.raises(StopIteration) as done:
            wrapper.send(torch.ones(2, 2))
        assert done.value.value.tolist() == [[1, 1], [1, 1]] and seen == {"replay_ratio_clipfrac": 0.5}


class TestReflection:
    """Second draws of prompts that mostly fail."""

    def drawn(self, plugin: R3, run: FakeRun, count: int = 8) -> Prompts:
        prompts = Prompts([Prompt(number, dict(run.dataset[number])) for number in range(count)])
        plugin.prepare_prompts(run, prompts)
        return prompts

    def taught(self, **options) -> R3:
        plugin = method(**options)
        train_step(plugin, make_run(1), {number: [number > 1] * 3 + [False] for number in range(8)})
        return plugin

    def test_hard_prompts_take_the_place_of_others(self):
        plugin, run = self.taught(), make_run(2)
        prompts = self.drawn(plugin, run)
        second = [prompt for prompt in prompts if prompt.row[REFLECTIVE]]
        assert sorted(prompt.id for prompt in second) == [0, 1]
        ids = [prompt.id for prompt in prompts]
        assert ids.count(0) == ids.count(1) == 2 and len(ids) == 8
        assert run.metrics == {"isr_prompts": 2, "isr_hard": 2, "isr_too_long": 0}
        roles = [message["role"] for message in second[0].messages]
        assert roles == ["user", "assistant", "user"]
        shown = second[0].messages[1]["content"]
        assert len(shown) == BUDGET and len(set(shown)) == 1
        plain = next(prompt for prompt in prompts if prompt.id == 0 and not prompt.row[REFLECTIVE])
        assert len(plain.messages) == 1

    def test_not_in_the_first_epoch_and_not_beyond_its_share(self):
        assert self.drawn(self.taught(), run := make_run(1)) and run.metrics["isr_prompts"] == 0
        assert self.drawn(self.taught(reflect_share=0.125), run := make_run(2)) and run.metrics["isr_prompts"] == 1
        assert self.drawn(self.taught(reflect_share=0.0), run := make_run(2)) and run.metrics["isr_prompts"] == 0

    def test_where_all_are_hard_they_give_way_to_each_other(self):
        plugin = method(reflect_share=0.5)
        train_step(plugin, make_run(1), {number: [False] * N for number in range(8)})
        prompts = self.drawn(plugin, run := make_run(2))
        assert (run.metrics["isr_hard"], run.metrics["isr_prompts"]) == (8, 4)
        ids = {again: {p.id for p in prompts if p.row[REFLECTIVE] == again} for again in (0.0, 1.0)}
        assert ids[0.0] == ids[1.0] and len(ids[0.0]) == 4, "each beside its plain group"

    def test_an_epoch_ends_where_no_batch_can_be_filled(self):
        plugin = method()
        train_step(plugin, make_run(1, rows=12), {number: [False] * N for number in range(8)})
        self.drawn(plugin, run := make_run(2, rows=12))
        assert run.metrics["isr_prompts"] > 0

    def test_a_long_failure_is_cut_in_the_middle_or_left_out(self):
        plugin = method()
        batch = answers(1, {0: [False] * N})
        long = {"responses": torch.arange(50)[None].repeat(4, 1) + 40, "response_mask": torch.ones(4, 50)}
        long |= {"rm_scores": torch.zeros(4, 50), "rollout_log_probs": torch.zeros(4, 50)}
        long |= {"response_lengths": torch.full((4,), 50)}
        plugin.observe(make_run(1), answers(1, {0: [False] * N}, **long))
        asked = len("user: 0\nassistant: \nuser: \n") + len(plugin.instruction.template)
        run = make_run(2, max_prompt_length=asked + 25)
        second = next(prompt for prompt in self.drawn(plugin, run) if prompt.row[REFLECTIVE])
        whole = "".join(map(chr, range(40, 90)))
        head, tail = second.messages[1]["content"].split(" … ")
        assert whole.startswith(head) and whole.endswith(tail) and len(head) == len(tail) == 10
        run = make_run(2, max_prompt_length=asked + 10)
        assert not any(prompt.row[REFLECTIVE] for prompt in self.drawn(plugin, run))
        assert run.metrics["isr_too_long"] == 1
        assert len(batch) == 4

    def test_the_instruction_may_name_the_problem(self, tmp_path):
        file = tmp_path / "wording.yaml"
        file.write_text("instruction: 'Wrong. $problem again'")
        second = next(p for p in self.drawn(self.taught(wording=str(file)), make_run(2)) if p.row[REFLECTIVE])
        assert second.messages[2]["content"] == f"Wrong. {second.id} again"

    @pytest.mark.parametrize(
        "text", ["other: x", "instruction: ''", "instruction: $solution", "instruction: 3 $", "- x"]
    )
    def test_wording_that_cannot_be_used(self, tmp_path, text):
        file = tmp_path / "wording.yaml"
        file.write_text(text)
        with pytest.raises(CompositionError, match="must be a YAML file with a text `instruction`"):
            method(wording=str(file))

    @pytest.mark.parametrize(("right", "seen", "tau"), [(7, 25, 0.28), (7, 50, 0.14), (14, 25, 0.56), (1, 4, 0.25)])
    def test_a_mean_of_tau_is_not_hard(self, right, seen, tau):
        assert not is_hard(np.array([float(right)]), np.array([float(seen)]), tau, 2)[0]

    def test_prompts_without_a_failure_are_not_hard(self):
        assert is_hard(np.array([0.0, 1, 1]), np.array([0.0, 1, 8]), 1.0, 2).tolist() == [False, False, True]


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
