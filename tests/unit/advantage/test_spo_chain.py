"""SPO-chain: where responses are cut, which continuations are asked for, and what segments earn."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, Rollout, Tokens
from verl_plugins.advantage.spo_chain import CUTS, VALUES, SpoChain, cutpoints, k3, segment_advantage, valued, whitened

FEW = settings(max_examples=80, deadline=None)
SURE, UNSURE = 0.95, 0.4
RHO = 0.9


def in_words(n: int, cuts: list[int], values: list[float], score: float, probabilities: list[float]) -> list[float]:
    """The sheet's walk over the positions of one response."""
    if not cuts:
        return [0.0] * n
    at = {cut: value for cut, value in zip(cuts, values, strict=True) if cut >= 0} | {n - 1: score}
    base = dict(zip(cuts, values, strict=True)).get(-1)
    change = {}
    for place in sorted(at):
        change[place] = 0.0 if base is None else at[place] - base
        base = at[place]
    ends = sorted(at)
    spread = [change[next(end for end in ends if end >= place)] for place in range(n)]
    return [0.0 if p > RHO else value for value, p in zip(spread, probabilities, strict=True)]


@st.composite
def responses(draw):
    """Probabilities of up to four responses, their cuts with values, scores."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        probabilities = draw(st.lists(st.sampled_from([SURE, UNSURE, 0.7]), min_size=1, max_size=7))
        ends = cutpoints(np.log(probabilities), [1] * len(probabilities), RHO, draw(st.integers(1, 3)))
        values = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=len(ends), max_size=len(ends)))
        rows.append((probabilities, ends, values, draw(st.sampled_from([0.0, 1.0]))))
    return rows


def advantages(rows, width: int) -> torch.Tensor:
    lengths = torch.tensor([len(row[0]) for row in rows])
    logs = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        logs[number, : len(row[0])] = torch.tensor(row[0]).log()
    table = valued([row[1] for row in rows], [row[2] for row in rows], width)
    return segment_advantage(table, torch.tensor([row[3] for row in rows]), lengths, logs, RHO)


@FEW
@given(responses(), st.integers(0, 3))
def test_segments_earn_the_change_of_value(rows, more):
    width = max(len(row[0]) for row in rows) + more
    found = advantages(rows, width)
    for row, (probabilities, cuts, values, score) in zip(found, rows, strict=True):
        n = len(probabilities)
        assert row[:n].tolist() == pytest.approx(in_words(n, cuts, values, score, probabilities), abs=1e-9)


@FEW
@given(responses())
def test_a_response_whose_values_are_all_its_score_earns_nothing(rows):
    same = [(probabilities, cuts, [score] * len(cuts), score) for probabilities, cuts, _, score in rows]
    assert not advantages(same, 8).any()


@pytest.mark.parametrize(
    ("probabilities", "interval", "ends"),
    [
        ([SURE, UNSURE, SURE, UNSURE, UNSURE], 1, [0, 2, 3]),
        ([SURE, UNSURE, SURE, UNSURE, UNSURE], 2, [0, 3]),
        ([UNSURE, SURE], 5, [-1]),
        ([SURE, SURE], 1, []),
        ([RHO, 0.9 - 1e-4], 1, [0]),
        ([], 1, []),
    ],
)
def test_where_a_response_is_cut(probabilities, interval, ends):
    assert cutpoints(np.log(np.float32(probabilities)), [1] * len(probabilities), RHO, interval) == ends


def test_no_cut_in_what_others_wrote():
    assert cutpoints(np.log([UNSURE, UNSURE, UNSURE]), [1, 0, 1], RHO, 1) == [-1, 1]


class TestWhitened:
    def test_mean_and_variance_over_the_unsure(self):
        given = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 9.0]], dtype=torch.double)
        over = torch.tensor([[True, True, False], [True, False, False]])
        mask = torch.tensor([[True, True, True], [True, True, False]])
        found = whitened(given, over, mask)
        assert found[over].mean() == pytest.approx(0, abs=1e-9) and found[over].var() == pytest.approx(1, abs=1e-6)
        std = np.std([1, 2, 4], ddof=1)
        assert found[0, 2] == pytest.approx((0 - 7 / 3) / std, abs=1e-6) and found[1, 2] == 0

    def test_one_token_is_left_alone(self):
        given = torch.tensor([[0.5, 0.0]])
        assert whitened(given, torch.tensor([[True, False]]), torch.ones(1, 2, dtype=torch.bool)).tolist() == [
            [0.5, 0.0]
        ]

    def test_without_any_unsure_one_all_count(self):
        given, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
        assert whitened(given, torch.zeros_like(mask), mask).tolist() == [
            [pytest.approx(-(2**-0.5)), pytest.approx(2**-0.5)]
        ]


def rollout(ids: list[int], probabilities: list[float], score: float = 1.0, truncated: bool = False) -> Rollout:
    logs = np.log(probabilities).tolist()
    return Rollout("", ids, score, score > 0, truncated, {}, object(), logs, [1] * len(ids))


class TestContinuing:
    def play(self, group: list[Rollout], answers: dict, **options) -> tuple[list[tuple], FakeRun]:
        asked, run = [], FakeRun()

        async def sample(n=None, *, prefix=()):
            if n is None:
                return group
            asked.append((n, tuple(prefix)))
            return answers.get(tuple(prefix), [rollout([9], [UNSURE], 0.0)])

        plugin = SpoChain(SpoChain.Config(**{"interval": 1, "samples": 4} | options))
        asyncio.run(plugin.rollout_group(run=run, prompt=None, sample=sample))
        return asked, run

    def test_equal_prefixes_are_continued_once(self):
        group = [rollout([5, 6, 7], [UNSURE, UNSURE, SURE]), rollout([5, 8], [UNSURE, UNSURE])]
        asked, run = self.play(group, {(): [rollout([1], [SURE], 1.0), rollout([2], [SURE], 0.0)]})
        assert sorted(asked) == [(4, ()), (4, (5,))]
        assert group[0].fields == group[1].fields == {CUTS: [-1, 0], VALUES: [0.5, 0.0]}
        assert run.metrics["mc_unique_frac"] == 0.5 and run.metrics["num_cutpoints"] == 2

    def test_an_answer_that_is_cut_off_is_worth_nothing(self):
        group = [rollout([5], [UNSURE])]
        _, run = self.play(group, {(): [rollout([1], [SURE], 1.0, truncated=True), rollout([2], [SURE], 1.0)]})
        assert group[0].fields[VALUES] == [0.5] and run.metrics["mc_trunc_frac"] == 0.5

    def test_failed_continuations_leave_the_mean_of_the_others_or_nothing(self):
        group = [rollout([5, 6], [UNSURE, UNSURE])]
        self.play(group, {(): [], (5,): [rollout([1], [SURE], 1.0)]})
        assert group[0].fields == {CUTS: [-1, 0], VALUES: [0.0, 1.0]}

    def test_a_response_without_an_unsure_token_asks_for_none(self):
        group = [rollout([5, 6], [SURE, SURE])]
        asked, run = self.play(group, {})
        assert not asked and group[0].fields == {CUTS: [], VALUES: []} and "mc_value_mean" not in run.metrics

    def test_what_it_costs_is_logged(self):
        group = [rollout([5, 6], [UNSURE, SURE]), rollout([7, 8], [SURE, SURE])]
        _, run = self.play(group, {(): [rollout([1, 2, 3], [SURE] * 3)] * 2})
        assert run.metrics["extra_tokens_per_response"] == 3.0


def batch(truncated: bool = False) -> Batch:
    """Two responses of three tokens, cut before the second: worth 0.5 there, and right in the end."""
    logs = torch.tensor([[SURE, UNSURE, 0.7], [SURE, UNSURE, SURE]]).log()
    end = 7 if truncated else 2
    return Batch.from_tensors(
        uid=["0-1-0", "1-1-0"],
        response_mask=torch.ones(2, 3, dtype=torch.bool),
        response_lengths=torch.tensor([3, 3]),
        responses=torch.tensor([[5, 5, end], [5, 5, 2]]),
        old_log_probs=logs,
        rm_scores=torch.tensor([[0.0, 0, 1], [0, 0, 1]]),
        budget=3,
        tokenizer=SimpleNamespace(eos_token_id=2),
        **{CUTS: [[0], [0]], VALUES: [[0.5], [0.25]]},
    )


class TestAdvantage:
    def test_as_the_paper_has_it(self):
        run = FakeRun()
        found = SpoChain(SpoChain.Config(whiten="none")).estimate_advantage(run, batch())
        assert found.tolist() == [[0, 0.5, 0.5], [0, 0.75, 0]]
        assert run.metrics["adv_nonzero_frac"] == 0.5
        assert run.metrics["segment_advantage_abs"] == pytest.approx((0.5 + 0.5 + 0.75) / 3)

    def test_the_share_of_tokens_with_an_advantage(self):
        run, rows = FakeRun(), batch()
        rows._fields["old_log_probs"] = torch.tensor([[UNSURE, UNSURE, 0.7], [SURE, UNSURE, UNSURE]]).log()
        SpoChain(SpoChain.Config(whiten="none")).estimate_advantage(run, rows)
        assert run.metrics["adv_nonzero_frac"] == pytest.approx(4 / 6)

    def test_an_answer_cut_off_counts_as_wrong(self):
        found = SpoChain(SpoChain.Config(whiten="none")).estimate_advantage(FakeRun(), batch(truncated=True))
        assert found[0].tolist() == [0, -0.5, -0.5]

    def test_whitened_as_in_the_code(self):
        found = SpoChain(SpoChain.Config()).estimate_advantage(FakeRun(), batch())
        chosen = np.array([0.5, 0.5, 0.75])
        assert found[1, 1] == pytest.approx((0.75 - chosen.mean()) / chosen.std(ddof=1), abs=1e-4)
        assert found[0, 0] == pytest.approx(-chosen.mean() / chosen.std(ddof=1), abs=1e-4)


def tokens(log_probs: torch.Tensor, logged: dict, **options) -> Tokens:
    info = {"batch_num_tokens": 4, "global_batch_size": 2}
    config = SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info=info)
    return Tokens(
        **{
            "log_probs": log_probs,
            "old_log_probs": torch.zeros_like(log_probs),
            "advantages": torch.ones_like(log_probs),
            "response_mask": torch.ones_like(log_probs),
            "config": config,
            "extra": {"ref_log_prob": torch.zeros_like(log_probs)}.__getitem__,
            "log": lambda owner, metrics, reduce: logged.update(metrics),
        }
        | options
    )


class TestLoss:
    def test_no_dual_clip(self):
        """A bad token whose probability has risen tenfold costs all of it."""
        seen = tokens(torch.tensor([[np.log(9.0)]]), {}, advantages=torch.tensor([[-1.0]]))
        assert float(SpoChain(SpoChain.Config()).policy_loss(seen)) == pytest.approx(9.0)

    def test_clip_and_its_share(self):
        logged: dict = {}
        found = SpoChain(SpoChain.Config()).policy_loss(tokens(torch.tensor([[0.5, 0.0, -0.5, 0.1]]), logged))
        assert found[0].tolist() == pytest.approx([-1.2, -1.0, -np.exp(-0.5), -np.exp(0.1)])
        assert logged["clip_frac"] == 0.25
        assert logged["ratio_mean"] == pytest.approx(np.exp([0.5, 0, -0.5, 0.1]).mean())

    def test_a_micro_batch_that_ran_away_counts_for_nothing(self):
        assert not SpoChain(SpoChain.Config()).policy_loss(tokens(torch.tensor([[5.0, 5.0]]), {})).any()

    def test_tokens_outside_the_mask_do_not_count(self):
        mask, logged = torch.tensor([[1, 0]]), {}
        seen = tokens(torch.tensor([[0.1, 8.0]]), logged, response_mask=mask)
        assert float(SpoChain(SpoChain.Config()).policy_loss(seen)[0, 0]) == pytest.approx(-np.exp(0.1))
        assert logged["ratio_mean"] == pytest.approx(np.exp(0.1))

    def test_an_empty_mask_is_no_number_s_fault(self):
        logged: dict = {}
        seen = tokens(torch.zeros(1, 2), logged, response_mask=torch.zeros(1, 2))
        assert torch.isfinite(SpoChain(SpoChain.Config()).policy_loss(seen)).all()
        assert logged == {"ratio_mean": 0.0, "clip_frac": 0.0}

    def test_kl_is_a_sum_over_each_response(self):
        logs = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
        found = SpoChain(SpoChain.Config(kl_coef=0.5)).loss_terms(tokens(logs, {}))["spo_kl"]
        by_verl = found.sum() / 4
        assert float(by_verl) == pytest.approx(0.5 * float(k3(logs, torch.zeros(2, 2)).sum(1).mean()))
        assert SpoChain(SpoChain.Config()).loss_terms(tokens(logs, {})) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rollout.agent.default_agent_loop": "tool_agent"}, "single_turn_agent"),
        ({"rollout.calculate_log_probs": False}, "calculate_log_probs=true"),
        ({"actor.use_kl_loss": False}, "use_kl_loss=true"),
        ({"actor.loss_agg_mode": "seq-mean-token-mean"}, "loss_agg_mode=token-mean"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(change, says, sentence):
    config = OmegaConf.create(
        {
            "rollout": {"agent": {"default_agent_loop": "single_turn_agent"}, "calculate_log_probs": True},
            "actor": {"use_kl_loss": True, "loss_agg_mode": "token-mean"},
        }
    )
    plugin = SpoChain(SpoChain.Config(kl_coef=1e-4))
    plugin.check(OmegaConf.create({"actor_rollout_ref": config}))
    for key, value in change.items():
        OmegaConf.update(config, key, value)
    with pytest.raises(CompositionError) as refusal:
        plugin.check(OmegaConf.create({"actor_rollout_ref": config}))
    sentence(refusal.value, "plugins.spo_chain", says)
