"""COPO: entropy of the answers, the advantage of a prompt, and the gate between it and that of a response."""

from __future__ import annotations

import math
from collections import Counter
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from advantages import batch_of, per_row
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Groups, Tokens
from verl_plugins.advantage.copo import (
    GLOBAL,
    WEIGHT,
    Copo,
    answer_entropy,
    global_advantage,
    local_weight,
    number_answers,
    prompt_return,
)
from verl_plugins.advantage.grpo import grpo_advantage
from verl_plugins.bridge.defaults import ActorDefaults, clipped_loss
from verl_plugins.composition.manager import Plugins

FEW = settings(max_examples=50, deadline=None)
ANSWERS = st.sampled_from(["1", "2", " 2", "x", "", None])


@st.composite
def answered(draw):
    """uid, score 0 or 1 and answer of each row, groups of 1 to 7 in any order."""
    groups = draw(
        st.lists(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), ANSWERS), min_size=1, max_size=7), min_size=1)
    )
    rows = [(f"{number}-1-0", score, answer) for number, group in enumerate(groups[:5]) for score, answer in group]
    return [list(column) for column in zip(*draw(st.permutations(rows)), strict=True)]


def method(**options) -> Copo:
    return Copo(Copo.Config(**options))


def make_batch(uid, scores, answers, **fields) -> Batch:
    return batch_of(uid, scores, answer=list(answers), **fields)


def estimate(uid, scores, answers, run=None, fields=None, **options) -> torch.Tensor:
    batch = make_batch(uid, scores, answers, **(fields or {}))
    return per_row(method(**options).estimate_advantage(run or FakeRun(), batch))


def entropy_of(answers) -> float:
    """The formula, for one group without missing answers."""
    shares = [count / len(answers) for count in Counter(answers).values()]
    return -sum(share * math.log2(share + 1e-8) for share in shares)


class TestEntropy:
    """Of the extracted answers of a group, in bits."""

    @FEW
    @given(answered())
    def test_formula(self, rows):
        uid, _, answers = rows
        texts = [(answer or "").strip() or f"missing {row}" for row, answer in enumerate(answers)]
        found = answer_entropy(number_answers(answers), Groups(uid))
        for row, name in enumerate(uid):
            group = [text for text, other in zip(texts, uid, strict=True) if other == name]
            assert float(found[row]) == pytest.approx(entropy_of(group), abs=1e-9)

    def test_missing_answers(self):
        groups, answers = Groups(["a"] * 4), number_answers(["", None, "1", " "])
        assert answers.tolist() == [-1, -1, 0, -1]
        assert float(answer_entropy(answers, groups)[0]) == pytest.approx(2, abs=1e-6)
        assert float(answer_entropy(answers, groups, distinct_missing=False)[0]) == pytest.approx(
            entropy_of("aaab"), abs=1e-9
        )

    def test_the_same_answer_to_another_prompt_is_another(self):
        found = answer_entropy(number_answers(["x", "y", "z", "x"]), Groups(["a", "a", "b", "c"]))
        assert found.tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)

    def test_numbers_and_texts(self):
        assert number_answers([1.0, "1.0", 2, " 2 ", None, float("nan")]).tolist() == [0, 0, 1, 1, -1, -1]

    def test_only_the_last_output_of_a_session_counts(self):
        fields = {"session": [0, 0, 1], "turn": [0, 1, 0]}
        batch = make_batch(["1-1-0"] * 3, [0.0, 1.0, 0.0], ["7", "1", "1"], **fields)
        assert float(answer_entropy(method().answers(batch), batch.groups).abs().max()) < 1e-6


class TestGlobal:
    """One value per prompt, normalised over prompts."""

    @FEW
    @given(st.lists(st.integers(0, 8), min_size=2, max_size=6))
    def test_formula(self, counts):
        uid = [str(number) for number in range(len(counts)) for _ in range(8)]
        scores = torch.tensor([float(place < count) for count in counts for place in range(8)])
        groups = Groups(uid)
        found = global_advantage(groups.mean(scores), groups)[::8].tolist()
        rates = [count / 8 for count in counts]
        if len(set(rates)) == 1:
            assert found == [0.0] * len(rates)
        else:
            expected = [(rate - fmean(rates)) / (stdev(rates) + 1e-6) for rate in rates]
            assert found == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("scale", ["std", "none"])
    @pytest.mark.parametrize("rate", [0.0, 0.1, 1 / 3, 1.0])
    @pytest.mark.parametrize("prompts", [1, 2, 12])
    def test_equal_prompts_are_exactly_zero(self, prompts, rate, scale):
        groups = Groups([number // 3 for number in range(3 * prompts)])
        assert (global_advantage(torch.full((3 * prompts,), rate), groups, scale) == 0).all()

    def test_prompts_count_once_whatever_their_size(self):
        groups = Groups(["a"] * 7 + ["b"])
        found = global_advantage(torch.tensor([1.0] * 7 + [0.0]), groups, "none")
        assert found.tolist() == [0.5] * 7 + [-0.5]

    def test_coefficient(self):
        groups, mean = Groups(["a"] * 4 + ["b"]), torch.tensor([0.5] * 4 + [1.0], dtype=torch.float64)
        entropy = torch.tensor([2.0] * 4 + [0.0], dtype=torch.float64)
        assert prompt_return(mean, entropy, groups, True).tolist() == [0.125] * 4 + [1.0], "all differ: 1/n is left"
        assert torch.equal(prompt_return(mean, entropy, groups), mean)
        assert prompt_return(mean[:2], torch.ones(2), Groups(["a"] * 2), True).tolist() == [0.25] * 2


class TestAdvantage:
    """w A + (1 - w) G."""

    @FEW
    @given(answered(), st.randoms(use_true_random=False))
    def test_row_order_does_not_matter(self, rows, random):
        order = random.sample(range(len(rows[0])), len(rows[0]))
        shuffled = [[column[row] for row in order] for column in rows]
        torch.testing.assert_close(estimate(*rows)[order], estimate(*shuffled))

    @FEW
    @given(answered(), st.sampled_from(["soft", "soft-with-zero"]))
    def test_float32_suffices(self, rows, gate):
        double = estimate(*rows, fields={"dtype": torch.float64}, gate=gate)
        torch.testing.assert_close(estimate(*rows, gate=gate), double, rtol=1e-5, atol=1e-5)

    @FEW
    @given(answered())
    def test_between_local_and_global(self, rows):
        uid, scores, _ = rows
        groups, given = Groups(uid), torch.tensor(scores)
        local = grpo_advantage(given, groups)
        across = global_advantage(groups.mean(given), groups)
        found = estimate(*rows, gate="soft")
        low, high = torch.minimum(local, across) - 1e-5, torch.maximum(local, across) + 1e-5
        assert ((low <= found) & (found <= high)).all()
        wrong = given == 0
        torch.testing.assert_close(estimate(*rows)[wrong], across[wrong], rtol=1e-4, atol=1e-5)

    def test_agreement_is_global_and_scatter_is_local(self):
        uid = ["1-1-0"] * 4 + ["2-1-0"] * 4
        scores, answers = [1.0] * 4 + [1.0, 0.0, 0.0, 0.0], ["7"] * 4 + ["1", "2", "3", "4"]
        found = estimate(uid, scores, answers, gamma=50.0)
        across = global_advantage(torch.tensor([1.0] * 4 + [0.25] * 4), Groups(uid))
        torch.testing.assert_close(found[:4], across[:4])
        assert float(found[4]) == pytest.approx(1.5, abs=1e-5), "the local advantage of the one that is right"
        torch.testing.assert_close(found[5:], across[5:])
        soft = estimate(uid, scores, answers, gamma=50.0, gate="soft")
        assert soft[5:].tolist() == pytest.approx([-0.5] * 3, abs=1e-5)

    @pytest.mark.parametrize("score", [0.0, 1.0])
    @pytest.mark.parametrize("size", [2, 3, 12])
    def test_a_batch_of_equal_scores_is_exactly_zero(self, size, score):
        uid = [f"{row % 2}-1-0" for row in range(2 * size)]
        assert (estimate(uid, [score] * 2 * size, ["1"] * 2 * size) == 0).all()

    def test_a_single_response_has_its_prompts_part_alone(self):
        uid, scores = ["1-1-0", "2-1-0", "2-1-0"], [1.0, 1.0, 0.0]
        found = estimate(uid, scores, ["1", "1", "2"], scale="none", gate="soft", gamma=1e3, rho=0.0)
        assert float(found[0]) == pytest.approx(0.5 * 0.25, abs=1e-3), "entropy 0 is the gate's middle"

    def test_rewards_are_used_when_nothing_is_divided(self):
        """The authors' code without std forgets the rewards in the gate, so that all is global."""
        uid, scores, answers = ["1-1-0"] * 2 + ["2-1-0"] * 2, [1.0, 0.0, 0.0, 0.0], ["1", "2", "3", "3"]
        found = estimate(uid, scores, answers, scale="none", gamma=1e3, rho=0.5)
        assert found.tolist() == pytest.approx([0.5, 0.25, -0.25, -0.25], abs=1e-5)

    @pytest.mark.parametrize("score", [-1.0, 0.5, 2.0])
    def test_other_scores_are_refused(self, score, sentence):
        with pytest.raises(DataError) as error:
            estimate(["1-1-0"] * 2, [1.0, score], ["1", "2"])
        sentence(error.value, "copo", "row 1-1-0_1_0", f"{score:g}", "expected 0 for wrong or 1")

    def test_without_extracted_answers(self):
        with pytest.raises(DataError, match="'answer' is neither"):
            method().estimate_advantage(FakeRun(), batch_of(["1-1-0"] * 2, [1.0, 0.0]))

    def test_metrics(self):
        run = FakeRun()
        uid = ["1-1-0"] * 2 + ["2-1-0"] * 2 + ["3-1-0"] * 2
        estimate(uid, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], ["1", "1", "1", "2", "", "5"], run)
        found = run.metrics
        assert found["answer_entropy_mean"] == pytest.approx(2 / 3, abs=1e-6)
        assert (found["answer_entropy_min"], found["answer_entropy_max"]) == pytest.approx((0, 1), abs=1e-6)
        assert found["unanimous_groups"] == pytest.approx(1 / 3)
        assert found["no_answer"] == pytest.approx(1 / 6)
        assert found["return_mean"] == pytest.approx(0.5)
        assert found["return_std"] == pytest.approx((1 / 6) ** 0.5)
        assert found["local_weight_min"] == 0
        assert found["opposite_signs"] == 0
        assert found["groups_with_signal"] == 1
        estimate(uid, [1.0] * 6, ["1", "1", "1", "2", "", "5"], run)
        assert found["groups_with_signal"] == 0


class TestTwoLosses:
    """w · loss(A) + (1 - w) · loss(G), the authors' form."""

    ROWS, WIDTH = 6, 4

    def tokens(self, drift: float, seed: int = 0, **fields) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        old = -random(self.ROWS, self.WIDTH).abs()
        config = SimpleNamespace(clip_ratio=0.5, clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0)
        config.get = lambda name, default=None: getattr(config, name, default)
        return Tokens(
            **{
                "log_probs": (old + drift * random(self.ROWS, self.WIDTH)).requires_grad_(),
                "old_log_probs": old,
                "advantages": random(self.ROWS, 1).expand(-1, self.WIDTH),
                "response_mask": torch.ones(self.ROWS, self.WIDTH),
                "config": config,
            }
            | fields
        )

    def loss(self, plugin: Copo, tokens: Tokens) -> torch.Tensor:
        plugins = Plugins([plugin])
        plugins.add_fallback(ActorDefaults(lambda: 0.0))
        return plugins.hook.policy_loss(tokens=tokens)

    @pytest.mark.parametrize("drift", [0.0, 0.3])
    def test_blend_is_the_same_while_signs_agree(self, drift):
        tokens = self.tokens(drift)
        local, weight = tokens.advantages[:, 0], torch.linspace(0, 1, self.ROWS, dtype=torch.float64)
        across = 0.4 * local if drift else -local
        exact = self.tokens(drift, extra={GLOBAL: across, WEIGHT: weight}.__getitem__)
        blended = self.tokens(drift, advantages=(weight * local + (1 - weight) * across)[:, None].expand(-1, 4))
        one, other = self.loss(method(form="two_losses"), exact), self.loss(method(), blended)
        gradients = [
            torch.autograd.grad(loss.sum(), given.log_probs)[0] for loss, given in ((one, exact), (other, blended))
        ]
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(*gradients)

    def test_weights_of_zero_and_one(self):
        weight, across = torch.tensor([0.0, 1.0] * 3).double(), torch.linspace(-2, 2, self.ROWS).double()
        exact = self.tokens(0.5, extra={GLOBAL: across, WEIGHT: weight}.__getitem__)
        found = self.loss(method(form="two_losses"), exact)
        assert torch.equal(found[1::2], clipped_loss(exact)[1::2])
        other = self.tokens(0.5, advantages=across[:, None].expand(-1, 4))
        torch.testing.assert_close(found[::2], clipped_loss(other)[::2])

    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    @pytest.mark.parametrize(("moved", "ratio"), [(30.0, math.exp(20)), (-30.0, math.exp(-20)), (0.5, math.exp(0.5))])
    def test_the_global_loss_is_bounded_as_verls_is(self, advantage, moved, ratio):
        """log r within ±20, r within the clip range, and of a negative advantage no more than clip_ratio_c."""
        old = torch.full((self.ROWS, self.WIDTH), -1.0, dtype=torch.float64)
        across, zeros = torch.full((self.ROWS,), advantage).double(), torch.zeros(self.ROWS).double()
        fields = {"old_log_probs": old, "log_probs": (old + moved).requires_grad_()}
        tokens = self.tokens(0.0, **fields, extra={GLOBAL: across, WEIGHT: zeros}.__getitem__)
        within = min(max(ratio, 0.8), 1.3)
        expected = max(-advantage * ratio, -advantage * within)
        expected = min(expected, 3.0) if advantage < 0 else expected
        found = self.loss(method(form="two_losses"), tokens)
        assert found.flatten().tolist() == pytest.approx([expected] * found.numel())

    @pytest.mark.parametrize(("advantage", "moved", "expected"), [(-1.0, -9.0, 0.5), (1.0, 9.0, -1.5)])
    def test_without_ends_of_its_own_the_clip_range_is_symmetric(self, advantage, moved, expected):
        given = self.tokens(0.0, extra={GLOBAL: torch.full((6,), advantage), WEIGHT: torch.zeros(6)}.__getitem__)
        given.log_probs = (given.old_log_probs + moved).requires_grad_()
        given.config.clip_ratio_low = given.config.clip_ratio_high = None
        found = self.loss(method(form="two_losses"), given)
        assert found.flatten().tolist() == pytest.approx([expected] * found.numel())

    @pytest.mark.parametrize("count", [1, 3, 24])
    def test_both_losses_are_logged(self, count):
        """Means over the tokens: with the policy where it was, minus the advantages."""
        logged, mask = {}, (torch.arange(24) < count).view(self.ROWS, self.WIDTH)
        extra = {GLOBAL: torch.full((self.ROWS,), 3.25), WEIGHT: torch.full((self.ROWS,), 0.5)}
        log = lambda owner, metrics, reduce: logged.update(metrics)  # noqa: E731
        fields = {"advantages": torch.full((self.ROWS, self.WIDTH), 2.5), "response_mask": mask}
        self.loss(method(form="two_losses"), self.tokens(0.0, **fields, extra=extra.get, log=log))
        assert (logged["local_loss"], logged["global_loss"]) == pytest.approx((-2.5, -3.25))

    def test_a_micro_batch_of_padding_rows(self):
        logged, empty = {}, torch.zeros(self.ROWS, self.WIDTH)
        extra = {GLOBAL: torch.ones(self.ROWS), WEIGHT: torch.full((self.ROWS,), 0.5)}
        log = lambda owner, metrics, reduce: logged.update(metrics)  # noqa: E731
        self.loss(method(form="two_losses"), self.tokens(0.1, response_mask=empty, extra=extra.get, log=log))
        assert (logged["local_loss"], logged["global_loss"]) == (0, 0)

    def test_what_the_driver_sends(self):
        uid, scores, answers = ["1-1-0"] * 2 + ["2-1-0"] * 2, [1.0, 0.0, 1.0, 1.0], ["1", "2", "3", "3"]
        batch, plugin = make_batch(uid, scores, answers), method(form="two_losses")
        local = per_row(plugin.estimate_advantage(FakeRun(), batch))
        torch.testing.assert_close(local, grpo_advantage(torch.tensor(scores), Groups(uid)))
        weight, across = batch.written[WEIGHT], batch.written[GLOBAL]
        torch.testing.assert_close(weight * local + (1 - weight) * across, estimate(uid, scores, answers))
        blended = make_batch(uid, scores, answers)
        method().estimate_advantage(FakeRun(), blended)
        assert not blended.written


def test_gate():
    entropy, scores = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    soft = local_weight(entropy, scores, 5.0, 1.0, "soft")
    assert soft.tolist() == pytest.approx([1 / (1 + math.exp(5)), 0.5, 1 / (1 + math.exp(-5))])
    assert local_weight(entropy, scores, 5.0, 1.0).tolist() == [float(soft[0]), 0, float(soft[2])]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"actor_rollout_ref": {"rollout": {"n": 1}}}, "rollout.n=1"),
        ({"algorithm": {"filter_groups": {"enable": True}}}, "algorithm.filter_groups.enable=true"),
        ({"algorithm": {"use_kl_in_reward": True}}, "algorithm.use_kl_in_reward=true"),
        ({"algorithm": {"norm_adv_by_std_in_grpo": False}}, "plugins.copo.scale=none"),
    ],
)
def test_settings_it_cannot_work_with(config, names, sentence):
    with pytest.raises(CompositionError) as error:
        method().check(OmegaConf.create(config))
    sentence(error.value, names)
    method().check(OmegaConf.create({"algorithm": {"norm_adv_by_std_in_grpo": True}}))
