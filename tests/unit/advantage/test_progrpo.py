"""ProGRPO: confidence on prompt and response, and the term it adds to any estimator's advantages."""

from __future__ import annotations

import math

import pytest
import torch
from advantages import batch_of, outcomes
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.advantage.grpo import Grpo
from verl_plugins.advantage.mc_grpo import McGrpo
from verl_plugins.advantage.progrpo import ProGrpo, confidence, prompt_confidence
from verl_plugins.bridge.defaults import DriverDefaults
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.composition.manager import Plugins

FEW = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 1000)
TOKENS, PROMPT = 4, 3


def with_log_probs(uid, scores, seed: int = 0, dtype=torch.float32, tokens: int = TOKENS, **fields) -> Batch:
    """Responses of 1 to 4 tokens and prompts of 4, log-probs of their own for every row."""
    generator = torch.Generator().manual_seed(seed)
    given = {
        "old_log_probs": -torch.rand(len(uid), TOKENS, generator=generator, dtype=torch.float64).to(dtype),
        "prompt_log_probs": -torch.rand(len(uid), PROMPT, generator=generator, dtype=torch.float64).to(dtype),
        "prompt_lengths": torch.full((len(uid),), PROMPT + 1),
    }
    return batch_of(uid, scores, dtype=dtype, **(given | fields))


def estimate(batch: Batch, *others, run: FakeRun | None = None, **options) -> torch.Tensor:
    """Through the stage, around GRPO unless there are other estimators."""
    plugins = Plugins([*(others or [Grpo(Grpo.Config())]), ProGrpo(ProGrpo.Config(**options))])
    return plugins.hook.estimate_advantage(run=run or FakeRun(), batch=batch)


def plain(batch: Batch) -> torch.Tensor:
    return Grpo(Grpo.Config()).estimate_advantage(FakeRun(), batch)


@st.composite
def masked_rows(draw):
    """Log-probs and masks with holes, every row with at least one token."""
    rows, width, seed = draw(st.integers(1, 6)), draw(st.integers(1, 30)), draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < draw(st.floats(0.1, 1))
    mask[:, draw(st.integers(0, width - 1))] = True
    return -torch.rand(rows, width, generator=generator, dtype=torch.float64), mask


class TestConfidence:
    """exp of the mean of the k smallest, k = max(1, ceil(share n))."""

    @FEW
    @given(masked_rows(), st.sampled_from([0.05, 0.2, 0.5, 1.0]))
    def test_is_what_sorting_each_row_gives(self, rows, share):
        log_probs, mask = rows
        expected = []
        for row, tokens in zip(log_probs, mask, strict=True):
            smallest = sorted(row[tokens].tolist())
            k = max(1, math.ceil(share * len(smallest) - 1e-6))
            expected.append(math.exp(sum(smallest[:k]) / k))
        found = confidence(log_probs, mask, share)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(confidence(log_probs.float(), mask, share), found.float(), rtol=1e-5, atol=1e-6)

    @FEW
    @given(masked_rows(), SEEDS)
    def test_padding_order_and_masked_values_do_not_matter(self, rows, seed):
        log_probs, mask = rows
        found, generator = confidence(log_probs, mask, 0.2), torch.Generator().manual_seed(seed)
        wider = torch.nn.functional.pad(log_probs, (0, 5), value=-9.0)
        torch.testing.assert_close(confidence(wider, torch.nn.functional.pad(mask, (0, 5)), 0.2), found)
        garbage = torch.where(mask, log_probs, 100 * torch.randn(mask.shape, generator=generator).double())
        torch.testing.assert_close(confidence(garbage, mask, 0.2), found)
        order = torch.randperm(mask.shape[1], generator=generator)
        torch.testing.assert_close(confidence(log_probs[:, order], mask[:, order], 0.2), found)

    @pytest.mark.parametrize(("tokens", "k"), [(1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
    def test_how_many(self, tokens, k):
        log_probs = -torch.arange(1.0, tokens + 1)[None]
        found = confidence(log_probs, torch.ones_like(log_probs).bool(), 0.2)
        assert float(found.log()) == pytest.approx(-sum(range(tokens - k + 1, tokens + 1)) / k)

    @pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.9, 1.0])
    def test_long_responses(self, share):
        log_probs = -torch.rand(3, 400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        k = math.ceil(400 * share - 1e-6)
        expected = [math.exp(sum(sorted(row)[:k]) / k) for row in log_probs.tolist()]
        found = confidence(log_probs, torch.ones_like(log_probs).bool(), share)
        assert found.tolist() == pytest.approx(expected)

    def test_many_long_responses(self):
        """So many that one which is not sorted right stands out."""
        log_probs = -torch.rand(600, 1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        found = confidence(log_probs, torch.ones_like(log_probs).bool(), 0.3)
        torch.testing.assert_close(found, log_probs.sort(1).values[:, :300].mean(1).exp(), rtol=1e-9, atol=0)

    def test_impossible_tokens_and_empty_rows(self):
        log_probs = torch.tensor([[-torch.inf, -1.0], [-1.0, -1.0]])
        mask = torch.tensor([[True, True], [False, False]])
        assert confidence(log_probs, mask, 0.2).tolist() == [0, 0]

    def test_of_a_prompt(self):
        log_probs, lengths = torch.tensor([[-1.0, -3.0, 0.0], [-0.5, 0.0, 0.0]]), torch.tensor([2, 1])
        assert prompt_confidence(log_probs, lengths).log().tolist() == pytest.approx([-2, -0.5])
        assert prompt_confidence(log_probs, lengths, 0.2).log().tolist() == pytest.approx([-3, -0.5])


class TestAdvantage:
    """A + alpha (c(q) - c(o)) in groups with a correct response."""

    @FEW
    @given(outcomes(), SEEDS, st.randoms(use_true_random=False))
    def test_row_order_does_not_matter(self, rows, seed, random):
        uid, scores = rows
        batch = with_log_probs(uid, scores, seed)
        order = random.sample(range(len(uid)), len(uid))
        fields = {name: batch._source.fetch(name)[order] for name in batch._source.fields}
        other = Batch.from_tensors(uid=[uid[row] for row in order], **fields)
        torch.testing.assert_close(estimate(batch)[order], estimate(other))

    @FEW
    @given(outcomes(), SEEDS)
    def test_grows_with_alpha(self, rows, seed):
        batch = with_log_probs(*rows, seed)
        base, one, two = plain(batch), estimate(batch, alpha=0.25), estimate(batch, alpha=0.5)
        assert torch.equal(estimate(batch, alpha=0.0), base)
        torch.testing.assert_close(two - base, 2 * (one - base), rtol=1e-4, atol=1e-5)

    @FEW
    @given(outcomes(), SEEDS)
    def test_float32_suffices(self, rows, seed):
        double = estimate(with_log_probs(*rows, seed, torch.float64))
        torch.testing.assert_close(estimate(with_log_probs(*rows, seed)), double, rtol=1e-5, atol=1e-5)

    @FEW
    @given(outcomes(), SEEDS)
    def test_groups_without_a_correct_response_keep_their_advantage(self, rows, seed):
        uid, scores = rows
        batch = with_log_probs(uid, scores, seed)
        unsolved = ~batch.groups.any(batch.correct)
        assert torch.equal(estimate(batch)[unsolved], plain(batch)[unsolved])
        assert (estimate(batch)[~batch.response_mask] == 0).all()

    def test_by_hand(self):
        batch = with_log_probs(
            ["1-1-0"] * 2,
            [1.0, 0.0],
            old_log_probs=torch.tensor([[-1.0, 5, 5, 5], [-2.0, -4.0, 5, 5]]),
            prompt_log_probs=torch.tensor([[-3.0, -1.0, 0.0]] * 2),
            prompt_lengths=torch.tensor([3, 3]),
        )
        base = 0.5**0.5
        found = estimate(batch, alpha=0.5)
        assert found[0].tolist() == pytest.approx([base + 0.5 * (math.exp(-2) - math.exp(-1)), 0, 0, 0], abs=1e-5)
        low = -base + 0.5 * (math.exp(-2) - math.exp(-4))
        assert found[1].tolist() == pytest.approx([low, low, 0, 0], abs=1e-5)

    @pytest.mark.parametrize("size", [1, 2, 8])
    def test_all_correct_groups(self, size):
        batch = with_log_probs(["1-1-0"] * size, [1.0] * size)
        assert (estimate(batch)[batch.response_mask] != 0).all()
        assert (estimate(batch, skip_all_correct=True) == 0).all()

    def test_rewards_of_plus_and_minus_one(self):
        uid, right = ["1-1-0"] * 2 + ["2-1-0"] * 2, [1.0, 0.0, 0.0, 0.0]
        signed = [2 * score - 1 for score in right]
        torch.testing.assert_close(estimate(with_log_probs(uid, signed)), estimate(with_log_probs(uid, right)))

    def test_around_other_estimators(self):
        batch = with_log_probs(["1-1-0"] * 4, [0.0, 1.0, 1.0, 0.0])
        shift = estimate(batch) - plain(batch)
        median = McGrpo(McGrpo.Config(epsilon=1.0))
        torch.testing.assert_close(
            estimate(batch, median), median.estimate_advantage(FakeRun(), batch) + shift, rtol=1e-5, atol=1e-6
        )
        plugins, default = Plugins([ProGrpo(ProGrpo.Config())]), DriverDefaults()
        plugins.add_fallback(default)
        given = batch.to_tokens(torch.full((4,), 7.0))
        default.estimator = lambda: given
        torch.testing.assert_close(plugins.hook.estimate_advantage(run=FakeRun(), batch=batch), given + shift)
        assert (given[batch.response_mask] == 7).all(), "what was handed over is left as it was"

    def test_a_group_is_judged_with_the_rows_that_were_dropped(self):
        uid = ["1-1-0"] * 2
        full = with_log_probs(uid, [1.0, 0.0])
        part = with_log_probs(uid[1:], [0.0], session=[1], full=full)
        assert float(estimate(part, Grpo(Grpo.Config()))[0, 0]) != 0

    def test_prompts_of_one_token_are_refused(self, sentence):
        batch = with_log_probs(["1-1-0"] * 2, [1.0, 0.0], prompt_lengths=torch.tensor([4, 1]))
        with pytest.raises(DataError) as error:
            estimate(batch)
        sentence(error.value, "row 1-1-0_1_0 has 1 token", "two or more")

    def test_metrics(self):
        run = FakeRun()
        batch = with_log_probs(
            ["1-1-0", "1-1-0", "2-1-0", "2-1-0"],
            [1.0, 0.0, 0.0, 0.0],
            old_log_probs=torch.tensor([[0.5], [0.25], [1.0], [1.0]]).log().expand(4, 4),
            prompt_log_probs=torch.full((4, 3), math.log(0.125)),
        )
        estimate(batch, run=run, alpha=4.0)
        found = run.metrics
        assert found["prompt_confidence"] == pytest.approx(0.125)
        assert (found["answer_confidence_correct"], found["answer_confidence_wrong"]) == pytest.approx((0.5, 0.75))
        assert found["answer_confidence_spread"] == pytest.approx(0.25 / 2**0.5 / 2)
        assert found["shift_mean"] == pytest.approx((-1.5 - 0.5) / 4)
        assert found["shift_abs_max"] == pytest.approx(1.5)
        assert found["active_groups"] == 0.5
        assert found["sign_changes"] == 0.25, "0.71 - 1.5 of the right one"


def test_an_advantage_that_is_taken_back_to_0_has_no_other_sign():
    fields = {"old_log_probs": torch.full((2, 4), -1e4), "prompt_log_probs": torch.zeros(2, PROMPT)}
    batch, run = with_log_probs(["1-1-0"] * 2, [1.0, 1.0], **fields), FakeRun()  # confidences of 1 and 0
    stage = ProGrpo(ProGrpo.Config(alpha=0.25)).estimate_advantage(run, batch)
    next(stage)
    with pytest.raises(StopIteration) as end:
        stage.send(batch.to_tokens(torch.tensor([-0.25, -0.125])))
    assert end.value.value[:, 0].tolist() == [0, 0.125]
    assert run.metrics["sign_changes"] == 0.5


def test_bypass_mode_is_refused(sentence):
    bypass = "algorithm.rollout_correction.bypass_mode=True"
    with pytest.raises(CompositionError) as error:
        needs.check(compose("progrpo", "cpu", [bypass]))
    sentence(error.value, "'progrpo'", bypass)


class TestWhoIsReweighted:
    """Groups with a right response; with `skip_all_correct` only if they have a wrong one, too."""

    UID = ["1-1-0"] * 3 + ["2-1-0"] * 3 + ["3-1-0"] * 3
    SCORES = [0.0, 0, 0, 1, 1, 1, 0, 1, 0]

    @pytest.mark.parametrize(("skip", "moved"), [(False, [False, True, True]), (True, [False, False, True])])
    @pytest.mark.parametrize("scope", ["all", "low"])
    def test_groups(self, skip, moved, scope):
        batch, run = with_log_probs(self.UID, self.SCORES), FakeRun()
        found = estimate(batch, run=run, skip_all_correct=skip, prompt_scope=scope) - plain(batch)
        assert (found.abs().sum(1) > 0).tolist() == [one for one in moved for _ in range(3)]
        assert run.metrics["active_groups"] == pytest.approx(sum(moved) / 3)

    def test_the_prompts_least_probable_share(self):
        """Of its tokens after the first, at least one; by the same rule as of a response."""
        log_probs = torch.tensor([[-0.1, -2.0, -0.5], [-0.3, -0.2, 9.0]])
        assert prompt_confidence(log_probs, torch.tensor([3, 2]), 0.2).tolist() == pytest.approx(
            [math.exp(-2), math.exp(-0.3)]
        )
        assert prompt_confidence(log_probs, torch.tensor([3, 2]), 0.5).tolist() == pytest.approx(
            [math.exp(-1.25), math.exp(-0.3)]
        )
        batch = with_log_probs(["1-1-0"] * 2, [1.0, 0.0])
        low = estimate(batch, prompt_scope="low", low_prob_ratio=0.6, alpha=1.0) - plain(batch)
        prompt = prompt_confidence(batch.prompt_log_probs, torch.tensor([PROMPT] * 2), 0.6)
        answer = confidence(batch.old_log_probs, batch.response_mask, 0.6)
        torch.testing.assert_close(low, batch.to_tokens(prompt - answer))
