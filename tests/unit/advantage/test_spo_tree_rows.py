"""SPO-tree: which rows are trained on and when, what is logged and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from trees import FIRST, OLD, QUESTION, Planted, group, plugin, rows_of, selected, star

from verl_plugins import Batch, CompositionError, Tokens
from verl_plugins.advantage.spo_tree import (
    ADVANTAGE,
    AGE,
    cut_or_repeated,
    drawn,
)
from verl_plugins.composition import manager
from verl_plugins.tokens import row_number

FEW = settings(max_examples=60, deadline=None)
SURE, UNSURE = float(np.log(0.95)), float(np.log(0.4))


class TestDrawing:
    @FEW
    @given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5), st.integers(0, 99))
    def test_all_of_a_question_or_as_many_as_may_be(self, question, most, salt):
        rows = np.array([row_number(str(place)) for place in range(len(question))], np.int64)
        taken = drawn(np.array(question, int), rows, most, salt)
        for name in set(question):
            assert taken[np.array(question) == name].sum() == min(most, question.count(name))

    @FEW
    @given(st.integers(1, 8), st.integers(1, 30), st.integers(0, 99))
    def test_cut_or_repeated_to_a_number(self, rows, count, salt):
        numbers = np.array([row_number(str(place)) for place in range(rows)], np.int64)
        times = cut_or_repeated(numbers, count, salt)
        assert times.sum() == count and times.max() <= -(-count // rows)
        order = np.random.default_rng(salt).permutation(rows)
        assert cut_or_repeated(numbers[order], count, salt).tolist() == times[order].tolist()

    def test_without_a_number_each_once_and_of_nothing_none(self):
        assert cut_or_repeated(np.array([5, 6]), None, 1).tolist() == [1, 1]
        assert cut_or_repeated(np.zeros(0, np.int64), 4, 1).tolist() == []
        assert drawn(np.zeros(0, int), np.zeros(0, np.int64), 2, 1).tolist() == []

    def test_every_row_as_often_as_any_other(self):
        numbers = np.array([row_number(str(place)) for place in range(5)], np.int64)
        counts = sum(drawn(np.zeros(5, int), numbers, 2, salt).astype(int) for salt in range(2000))
        np.testing.assert_allclose(counts / 2000, 0.4, atol=0.05)
        times = sum(cut_or_repeated(numbers, 7, salt) for salt in range(2000))
        np.testing.assert_allclose(times / 2000, 1.4, atol=0.05)


WIDE = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def back(batch: Batch) -> list[tuple[int, float]]:
    """Prompt and age of the rows that were brought back."""
    return sorted((new.past.prompt_id, new.past.columns[AGE]) for new in batch.additions)


class TestWaiting:
    def test_rows_wait_and_come_back_with_what_they_were_stored_with(self):
        made = plugin(rows_per_prompt=4)
        first, _ = selected([star(WIDE)], 1, made)
        assert int((~first.dropped).sum()) == 4 and len(made.store) == 2 and not first.additions
        waiting = {key for key, gone in zip(first.keys, first.dropped.tolist(), strict=True) if gone}
        second, run = selected([star([1, 1])], 2, made)
        assert back(second) == [(0, 1.0), (0, 1.0)] and second.dropped.all() and not second.update_skipped
        assert run.metrics["replay_age_mean"] == run.metrics["replay_age_max"] == 1 and len(made.store) == 0
        for new in second.additions:
            past = new.past
            assert past.uid == "0-1-0" and past.step == 1 and past.offset == 0
            assert past.context.tolist() == QUESTION and abs(past.columns[ADVANTAGE]) == 0.5
            assert past.reward == past.correct == (past.columns[ADVANTAGE] > 0)
            told = FakeRun(step=1).score([QUESTION], [past.response.tolist()])[0]
            assert past.old_log_probs.tolist() == told.tolist()
        assert {f"0-1-0_{new.past.response[0] - FIRST - 1}_0" for new in second.additions} == waiting

    def test_a_row_of_a_deeper_segment_has_its_context(self):
        made = plugin(rows_per_prompt=1)
        tree = Planted([-1, 0, 1, 1], [0, 0, 1, 0])
        selected([tree], 1, made)
        second, _ = selected([star([1, 1])], 2, made)
        (new,) = second.additions
        assert new.past.context.tolist() == [*QUESTION, FIRST + 1] and new.past.offset == 1

    def test_no_longer_than_they_may(self):
        made = plugin(rows_per_prompt=1, max_age=3)
        selected([star(WIDE)], 1, made)
        ages = []
        for step in range(2, 6):
            batch, run = selected([star([0, 0])], step, made)
            ages.append((len(batch.additions), run.metrics["replay_discarded"], run.metrics["replay_size"]))
        assert ages == [(1, 0, 4), (1, 0, 3), (0, 3, 0), (0, 0, 0)]

    def test_a_prompt_that_is_asked_again_is_the_same_question(self):
        made = plugin(rows_per_prompt=4)
        selected([star(WIDE)], 1, made)
        batch, _ = selected([star(WIDE)], 2, made)
        assert int((~batch.dropped).sum()) + len(batch.additions) == 4 and len(made.store) == 4

    @pytest.mark.parametrize(("rows", "size"), [(2, 2), (9, 9), (None, 4)])
    def test_as_many_rows_as_asked(self, rows, size):
        made = plugin(rows_per_prompt=4, rows=rows)
        batch, run = selected([star(WIDE)], 1, made)
        assert int((~batch.dropped).sum()) + len(batch.additions) == size
        assert len({new.key for new in batch.additions}) == len(batch.additions)
        assert all(new.past.columns[AGE] == 0 for new in batch.additions) and len(made.store) == 2
        assert run.metrics["replay_age_max"] == 0

    def test_a_step_without_rows_is_not_trained_on(self):
        batch, run = selected([star([0, 0]), star([1, 1])])
        assert batch.update_skipped and batch.keys[int((~batch.dropped).nonzero())] == "0-1-0_0_0"
        assert "replay_age_mean" not in run.metrics
        made = plugin()
        assert not torch.isnan(made.estimate_advantage(FakeRun(), later(batch))).any()

    def test_the_order_of_rows_changes_nothing(self):
        found = []
        for order in ([0, 1, 2], [2, 0, 1]):
            made, trees = plugin(rows_per_prompt=2, rows=7), [star(WIDE), star([1, 0, 0]), star(WIDE)]
            groups = {f"{place}-1-{place}": group(tree, made) for place, tree in enumerate(trees)}
            batch = rows_of({uid: groups[uid] for uid in np.array(list(groups))[order]})
            made.select_rows(FakeRun(step=1, dataset=FakeDataset(3)), batch)
            left = sorted(key for key, gone in zip(batch.keys, batch.dropped.tolist(), strict=True) if not gone)
            found.append((left, [new.key for new in batch.additions], made.store.state_dict()["row"].tolist()))
            assert made.store.state_dict()["uid"] == ["0-1-0"] * 4 + ["1-1-1"] + ["2-1-2"] * 4
        assert found[0] == found[1]

    def test_a_restart_changes_nothing(self):
        whole, before = plugin(rows_per_prompt=2), plugin(rows_per_prompt=2)
        for made in (whole, before):
            selected([star(WIDE), star(WIDE)], 1, made)
        after = plugin(rows_per_prompt=2)
        after.load_state_dict(before.state_dict())
        for step in (2, 3):
            one, other = (selected([star(WIDE), star([0, 1])], step, made)[0] for made in (whole, after))
            assert one.dropped.tolist() == other.dropped.tolist()
            assert [new.key for new in one.additions] == [new.key for new in other.additions]
            assert [new.past.response.tolist() for new in one.additions] == [
                new.past.response.tolist() for new in other.additions
            ]
        for name, values in whole.state_dict().items():
            np.testing.assert_array_equal(after.state_dict()[name], values, err_msg=name)


def later(batch: Batch, old: torch.Tensor | None = None) -> Batch:
    """The rows that stay, in the later stages."""
    stay = (~batch.dropped).nonzero()[:, 0].tolist()
    mask = batch.response_mask[stay]
    return Batch.from_tensors(
        uid=[batch.uid[row] for row in stay],
        response_mask=mask,
        rm_scores=torch.zeros(mask.shape),
        old_log_probs=torch.full(mask.shape, OLD) if old is None else old,
        full=batch,
        **{name: batch.written[name][stay] for name in (ADVANTAGE, AGE)},
    )


class TestAdvantage:
    ROWS = {
        "uid": ["0-1-0", "1-1-1"],
        "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        "rm_scores": torch.zeros(2, 3),
        "old_log_probs": torch.tensor([[UNSURE, SURE, UNSURE], [SURE, UNSURE, 0.0]]),
        ADVANTAGE: torch.tensor([0.5, -1.0]),
    }

    def test_the_edge_s_on_every_token(self):
        run = FakeRun()
        found = plugin(whiten="none").estimate_advantage(run, Batch.from_tensors(**self.ROWS))
        assert found.tolist() == [[0.5] * 3, [-1, -1, 0]] and run.metrics["masked_token_frac"] == pytest.approx(3 / 5)

    def test_whitened_over_the_unsure_tokens_of_the_step(self):
        found = plugin().estimate_advantage(FakeRun(), Batch.from_tensors(**self.ROWS))
        chosen = np.array([0.5, 0.5, -1])
        scaled = [(value - chosen.mean()) / chosen.std(ddof=1) for value in (0.5, -1)]
        assert found[0].tolist() == pytest.approx([scaled[0]] * 3, abs=1e-5)
        assert found[1].tolist() == pytest.approx([scaled[1], scaled[1], 0], abs=1e-5)

    def test_rho_is_a_setting(self):
        run = FakeRun()
        plugin(rho=0.3).estimate_advantage(run, Batch.from_tensors(**self.ROWS))
        assert run.metrics["masked_token_frac"] == 0

    def test_a_row_without_a_token(self):
        run, rows = FakeRun(), {**self.ROWS, "response_mask": torch.zeros(2, 3).bool()}
        assert not plugin().estimate_advantage(run, Batch.from_tensors(**rows)).any() and not run.metrics


class TestLogged:
    def test_of_the_trees(self):
        tree = Planted([-1, 0, 0, 1, 1, 3, 3], [0, 0, 1, 0, 0.5, 1, 0], cut=[5])
        _, run = selected([tree, star([0, 1])])
        values = {1: 0.5, 3: 0.5, 0: 0.75}
        expected = {
            "tree_leaves": (4 + 2) / 2,
            "tree_depth_mean": (1 + 2 + 3 + 3 + 1 + 1) / 6,
            "early_stop_frac": 4 / 6,
            "trunc_leaf_frac": 1 / 6,
            "root_value": (values[0] + 0.5) / 2,
            "kept_edge_frac": (2 + 0 + 2 + 2) / 8,
            "advantage_abs_depth_1": (0.25 + 0.25 + 0.5 + 0.5) / 4,
            "advantage_abs_depth_2": 0,
            "advantage_abs_depth_3": 0.5,
            "replay_discarded": 0,
            "replay_size": 0,
            "replay_age_mean": 0,
            "replay_age_max": 0,
        }
        assert run.metrics == pytest.approx(expected)

    def test_clipping_by_age(self):
        logged: dict[str, float] = {}
        logs = torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.0, 0.5], [9.0, 9.0]])
        tokens = Tokens(
            log_probs=logs,
            old_log_probs=torch.zeros(4, 2),
            advantages=torch.ones(4, 2),
            response_mask=torch.tensor([[1, 0], [1, 1], [1, 1], [0, 0]]),
            config=SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=0.2),
            extra={AGE: torch.tensor([0.0, 2.0, 2.0, 5.0])}.__getitem__,
            log=lambda owner, metrics, reduce: logged.update(metrics),
        )
        loss = plugin().policy_loss(tokens)
        assert loss[0].tolist() == pytest.approx([-1.2, -1.0])
        assert logged["clip_frac_age_0"] == 1 and logged["clip_frac_age_2"] == 0.75
        assert {"clip_frac_age_1", "clip_frac_age_5"}.isdisjoint(logged) and logged["clip_frac"] == pytest.approx(4 / 5)

    def test_a_micro_batch_of_padding(self):
        logged: dict[str, float] = {}
        tokens = Tokens(
            log_probs=torch.zeros(1, 1),
            old_log_probs=torch.zeros(1, 1),
            advantages=torch.zeros(1, 1),
            response_mask=torch.zeros(1, 1),
            config=SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=0.2),
            extra={AGE: torch.zeros(1)}.__getitem__,
            log=lambda owner, metrics, reduce: logged.update(metrics),
        )
        assert plugin().policy_loss(tokens).isfinite().all() and logged == {"ratio_mean": 0, "clip_frac": 0}

    def test_the_kl_term_is_spo_chain_s(self):
        info = {"batch_num_tokens": 4, "global_batch_size": 2}
        tokens = Tokens(
            log_probs=torch.tensor([[0.3, -0.2], [0.1, 0.4]]),
            old_log_probs=torch.zeros(2, 2),
            advantages=torch.zeros(2, 2),
            response_mask=torch.ones(2, 2),
            config=SimpleNamespace(global_batch_info=info),
            extra={"ref_log_prob": torch.zeros(2, 2)}.__getitem__,
        )
        k3 = [np.exp(-x) + x - 1 for x in (0.3, -0.2, 0.1, 0.4)]
        assert float(plugin(kl_coef=0.5).loss_terms(tokens)["spo_kl"].sum() / 4) == pytest.approx(0.5 * sum(k3) / 2)
        assert plugin().loss_terms(tokens) is None


CONFIG = {
    "actor_rollout_ref": {
        "rollout": {"agent": {"default_agent_loop": "single_turn_agent"}},
        "actor": {"use_kl_loss": True, "loss_agg_mode": "token-mean"},
    },
    "algorithm": {"use_kl_in_reward": False},
    "distillation": {"enabled": False},
    "plugins": {"spo_tree": {}, "prob_mask": {}},
}


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("actor_rollout_ref.rollout.agent.default_agent_loop", "tool_agent", "single_turn_agent"),
            ("actor_rollout_ref.actor.use_kl_loss", False, "use_kl_loss=true"),
            ("actor_rollout_ref.actor.loss_agg_mode", "seq-mean-token-sum", "loss_agg_mode=token-mean"),
            ("algorithm.use_kl_in_reward", True, "use_kl_in_reward=true"),
            ("distillation.enabled", True, "distillation.enabled=false"),
            ("plugins.adora", {}, "~plugins.adora"),
            ("plugins.progrpo", {}, "~plugins.progrpo"),
            ("plugins.ttrl", {}, "~plugins.ttrl"),
        ],
    )
    def test_before_anything_starts(self, key, value, says, sentence):
        config, made = OmegaConf.create(CONFIG), plugin(kl_coef=1e-4)
        made.check(config)
        OmegaConf.update(config, key, value, force_add=True)
        with pytest.raises(CompositionError) as refusal:
            made.check(config)
        sentence(refusal.value, "plugins.spo_tree", says)

    @pytest.mark.parametrize("branches", [[], [3, 0], [-1]])
    def test_levels_without_children(self, branches, sentence):
        with pytest.raises(CompositionError) as refusal:
            manager.build({"spo_tree": {"branches": branches}})
        sentence(refusal.value, "plugins.spo_tree", "branches=", "from 1 on")

    @pytest.mark.parametrize("other", ["spo_chain", "sage", "r3", "igpo", "mc_grpo", "clip_cov"])
    def test_two_that_answer_one_stage(self, other, sentence):
        with pytest.raises(CompositionError) as refusal:
            manager.build({"spo_tree": {}, other: {}})
        sentence(refusal.value, "'spo_tree'", f"'{other}'")
