"""DCPO: the mixture of advantages, when the extra forward pass is made and for which rows, and where H comes from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from advantages import batch_of, outcomes
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, Tokens
from verl_plugins.advantage.grpo import Grpo
from verl_plugins.advantage.mc_grpo import McGrpo
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.dcpo import Dcpo, mixing_weight

FEW = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 1000)
TOKENS = 4


class CountingRun(FakeRun):
    """Remembers the forward passes; its log-probs depend on the responses and the temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        rollout = {"actor_rollout_ref": {"rollout": {"temperature": temperature}}}
        super().__init__(config=OmegaConf.create(rollout))
        self.passes: list[tuple[list[str], float]] = []

    def log_probs(self, batch: Batch, temperature: float | None = None) -> torch.Tensor:
        self.passes.append((batch.keys, temperature))
        return super().log_probs(batch, temperature)


def batch(uid, scores, seed: int = 0, **fields) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    rows = len(uid)
    given = {
        "old_log_probs": -torch.rand(rows, TOKENS, generator=rng),
        "entropy": torch.rand(rows, TOKENS, generator=rng),
        "responses": torch.randint(0, 200, (rows, TOKENS), generator=rng),
        "response_lengths": torch.arange(rows) % TOKENS + 1,
        "prompts": torch.ones(rows, 2, dtype=torch.int64),
        "prompt_lengths": torch.full((rows,), 2),
    }
    return batch_of(uid, scores, **(given | fields))


def estimate(given: Batch, *others, run: FakeRun | None = None, **options) -> torch.Tensor:
    plugins = Plugins([*(others or [Grpo(Grpo.Config())]), Dcpo(Dcpo.Config(**options))])
    return plugins.hook.estimate_advantage(run=run or CountingRun(), batch=given)


def plain(given: Batch) -> torch.Tensor:
    return Grpo(Grpo.Config()).estimate_advantage(FakeRun(), given)


MIXED = ["1-1-0"] * 4 + ["2-1-0"] * 4, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


class TestMixingWeight:
    """alpha = a0 / (a0 + p)."""

    @FEW
    @given(st.floats(-3, 3), st.floats(0.01, 1), st.floats(0, 0.5))
    def test_is_the_authors_and_bounded(self, gap, success_rate, cap):
        a0 = min(abs(gap), cap)
        found = mixing_weight(gap, success_rate, cap)
        assert found == pytest.approx((a0 / success_rate) / (a0 / success_rate + 1))
        assert 0 <= found <= cap / (cap + success_rate)

    def test_without_a_right_answer_it_is_0(self):
        assert mixing_weight(0.3, 0.0, 0.1) == 0

    def test_fewer_right_answers_weigh_more(self):
        assert [round(mixing_weight(1, p, 0.1), 2) for p in (0.5, 0.1, 1 / 16)] == [0.17, 0.5, 0.62]


class TestAdvantage:
    """(1 - alpha) A + alpha z rho."""

    @FEW
    @given(outcomes(), SEEDS, st.sampled_from([0.0, 0.25, 2.0]))
    def test_is_the_formula(self, rows, seed, base):
        given, run = batch(*rows, seed), CountingRun()
        found = estimate(given, run=run, entropy_base=base)
        entropy = float(given.entropy[given.response_mask].double().mean())
        right = given.scores > 0.05
        alpha = mixing_weight(base - entropy, float(right.double().mean()), 0.1)
        temperature = 1.2 if entropy <= base else 0.8
        ratio = (CountingRun().log_probs(given, temperature) - given.old_log_probs).exp()
        expected = (1 - alpha) * plain(given) + alpha * right[:, None] * ratio * given.response_mask
        torch.testing.assert_close(found, expected)
        assert run.metrics["temperature"] == temperature
        assert run.metrics["alpha"] == pytest.approx(alpha)
        assert run.metrics["target_gap"] == pytest.approx(base - entropy)

    @FEW
    @given(outcomes(), SEEDS)
    def test_row_order_does_not_matter(self, rows, seed):
        uid, scores = rows
        given = batch(uid, scores, seed)
        order = torch.randperm(len(uid), generator=torch.Generator().manual_seed(seed))
        fields = {name: value[order] for name, value in given._source.fields.items()}
        other = Batch.from_tensors(uid=[uid[row] for row in order], **fields)
        torch.testing.assert_close(estimate(other), estimate(given)[order], rtol=1e-5, atol=1e-6)

    def test_a_score_at_the_threshold_is_wrong(self):
        given, run = batch(["1-1-0"] * 4, [0.25, 0.5, 0.75, 0.0]), CountingRun()
        found = estimate(given, run=run, score_threshold=0.5)
        assert run.metrics["true_ratio"] == 0.25
        assert run.passes[0][0] == ["1-1-0_2_0"]
        left = (1 - run.metrics["alpha"]) * plain(given)
        torch.testing.assert_close(found[[0, 1, 3]], left[[0, 1, 3]])

    def test_on_target_the_temperature_is_the_high_one(self):
        given = batch(*MIXED, entropy=torch.full((8, TOKENS), 0.25))
        for base, temperature in ((0.25, 1.2), (0.5, 1.2), (0.125, 0.8)):
            estimate(given, run=(run := CountingRun()), entropy_base=base)
            assert run.metrics["temperature"] == temperature
            assert run.metrics["forward_pass"] == (base != 0.25)
            assert run.metrics["a0"] == pytest.approx(min(abs(base - 0.25), 0.1))

    def test_all_right_is_pure_reinforcement(self):
        given = batch(["1-1-0"] * 4, [1.0] * 4)
        found = estimate(given)
        assert (plain(given) == 0).all()
        assert (found[given.response_mask] > 0).all()
        assert (found[~given.response_mask] == 0).all()

    def test_wrong_answers_keep_their_part(self):
        given, run = batch(*MIXED), CountingRun()
        found, wrong = estimate(given, run=run), given.scores == 0
        torch.testing.assert_close(found[wrong], (1 - run.metrics["alpha"]) * plain(given)[wrong])

    @pytest.mark.parametrize(("threshold", "right"), [(0.05, 3), (0.5, 2), (-0.5, 4)])
    def test_the_threshold_is_strict_and_signed(self, threshold, right):
        given, run = batch(["1-1-0"] * 5, [-1.0, 0.0, 0.5, 0.75, 1.0]), CountingRun()
        estimate(given, run=run, score_threshold=threshold)
        assert run.metrics["true_ratio"] == pytest.approx(right / 5)

    def test_a_session_with_several_outputs_counts_once_and_is_right_as_a_whole(self):
        uid, scores = ["1-1-0"] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]
        fields = {"session": [0, 0, 0, 1, 2], "turn": [0, 1, 2, 0, 0]}
        given, run = batch(uid, scores, **fields), CountingRun()
        estimate(given, run=run)
        assert run.metrics["true_ratio"] == pytest.approx(1 / 3)
        assert run.passes[0][0] == ["1-1-0_0_0", "1-1-0_0_1", "1-1-0_0_2"]

    def test_around_an_estimator_that_drops_rows_the_share_is_of_all_responses(self):
        whole, run = batch(["1-1-0"] * 3 + ["2-1-0"] * 3, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), CountingRun()
        plugin = McGrpo(McGrpo.Config())
        plugin.select_rows(run, whole)
        kept = ~whole.dropped
        fields = {name: value[kept] for name, value in whole._source.fields.items()}
        left = Batch.from_tensors(uid=list(whole.uid[kept.numpy()]), session=whole.session[kept], full=whole, **fields)
        estimate(left, plugin, run=run)
        assert run.metrics["true_ratio"] == pytest.approx(4 / 6)
        assert len(left) == 4

    def test_where_no_right_response_is_left_only_the_estimators_part_is(self):
        whole, run = batch(["1-1-0"] * 4, [0.0, 0.0, 0.0, 1.0]), CountingRun()
        fields = {name: value[:3] for name, value in whole._source.fields.items()}
        fields["rm_scores"] = -torch.arange(3.0)[:, None].expand(3, 4)
        left = Batch.from_tensors(uid=["1-1-0"] * 3, full=whole, **fields)
        found = estimate(left, run=run)
        assert 0 < run.metrics["alpha"] < 1
        assert (run.passes, run.metrics["forward_pass"]) == ([], 0)
        torch.testing.assert_close(found, (1 - run.metrics["alpha"]) * plain(left))

    @FEW
    @given(SEEDS)
    def test_metrics(self, seed):
        given, run = batch(*MIXED, seed), CountingRun()
        found, mask = estimate(given, run=run), given.response_mask
        ratio = (CountingRun().log_probs(given, run.metrics["temperature"]) - given.old_log_probs).exp()
        ratio = ratio[mask & (given.scores > 0.05)[:, None]]
        assert run.metrics["rho_mean"] == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert run.metrics["rho_min"] == pytest.approx(float(ratio.min()))
        assert run.metrics["rho_max"] == pytest.approx(float(ratio.max()))
        assert run.metrics["rho_min"] <= run.metrics["rho_p99"] <= run.metrics["rho_max"]
        assert run.metrics["abs_advantage_before"] == pytest.approx(float(plain(given)[mask].abs().mean()), rel=1e-5)
        assert run.metrics["abs_advantage"] == pytest.approx(float(found[mask].abs().mean()), rel=1e-5)
        added = run.metrics["alpha"] * float(ratio.sum())
        kept = (1 - run.metrics["alpha"]) * float(plain(given)[mask].abs().sum())
        assert run.metrics["reinforce_share"] == pytest.approx(added / (added + kept), rel=1e-5)


class TestForwardPass:
    """Made when it matters, for the rows it matters for."""

    def test_for_right_responses_only(self):
        run = CountingRun()
        estimate(batch(*MIXED), run=run)
        ((keys, temperature),) = run.passes
        assert keys == ["1-1-0_1_0", "1-1-0_2_0", "2-1-0_7_0"]
        assert temperature == 0.8
        assert run.metrics["forward_pass"] == 1

    def test_the_temperature_is_relative_to_that_of_the_rollout(self):
        run = CountingRun(temperature=0.5)
        estimate(batch(*MIXED), run=run, entropy_base=2.0)
        assert run.passes[0][1] == pytest.approx(1.2 * 0.5)

    @pytest.mark.parametrize(
        ("scores", "options"), [([0.0] * 4, {}), ([0.05] * 4, {}), ([0.0, 1.0, 0.0, 1.0], {"alpha_cap": 0.0})]
    )
    def test_not_without_a_right_answer_or_a_weight(self, scores, options):
        given, run = batch(["1-1-0"] * 4, scores), CountingRun()
        assert torch.equal(estimate(given, run=run, **options), plain(given))
        assert run.passes == []
        assert (run.metrics["alpha"], run.metrics["forward_pass"]) == (0, 0)

    def test_not_on_target(self):
        given, run = batch(*MIXED, entropy=torch.full((8, TOKENS), 0.25)), CountingRun()
        assert torch.equal(estimate(given, run=run), plain(given))
        assert run.passes == []
        assert run.metrics["temperature"] == 1.2


class TestPreviousEntropy:
    """entropy_source: previous_mc, the authors' estimate."""

    def plugin(self) -> Dcpo:
        return Dcpo(Dcpo.Config(entropy_source="previous_mc"))

    def test_the_first_step_takes_0(self):
        run = CountingRun()
        estimate(batch(*MIXED), run=run, entropy_source="previous_mc")
        assert (run.metrics["entropy"], run.metrics["temperature"]) == (0, 1.2)

    def test_is_what_the_last_update_measured_and_survives_a_restart(self):
        plugin, run = self.plugin(), CountingRun()
        plugin.on_step_end({"plugins/dcpo/previous_entropy": 0.7})
        plugin.on_step_end({"actor/entropy": 0.1})
        resumed = self.plugin()
        resumed.load_state_dict(plugin.state_dict())
        Plugins([Grpo(Grpo.Config()), resumed]).hook.estimate_advantage(run=run, batch=batch(*MIXED))
        assert (run.metrics["entropy"], run.metrics["temperature"]) == (0.7, 0.8)

    @pytest.mark.parametrize(("source", "expected"), [("previous_mc", [1.5]), ("current", [])])
    def test_is_the_mean_of_minus_log_pi_in_the_micro_batch(self, source, expected):
        logged = []
        log_probs = torch.tensor([[-1.0, -2.0, -9.0], [-9.0, -9.0, -9.0]], requires_grad=True)
        tokens = Tokens(
            log_probs=log_probs,
            old_log_probs=log_probs.detach(),
            advantages=torch.zeros(2, 3),
            response_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]),
            config=SimpleNamespace(),
            log=lambda owner, metrics, reduce: logged.append(metrics["previous_entropy"]),
        )
        plugin = Dcpo(Dcpo.Config(entropy_source=source))
        assert plugin.loss_terms(tokens) is None
        tokens.response_mask[:] = False
        assert plugin.loss_terms(tokens) is None
        assert logged == expected


@pytest.mark.parametrize("bypass", ["algorithm.rollout_correction.bypass_mode=True"])
def test_bypass_mode_is_refused(bypass, sentence):
    with pytest.raises(CompositionError) as error:
        needs.check(compose("dcpo", "cpu", [bypass]))
    sentence(error.value, "'dcpo'", bypass)


def test_kl_in_the_reward_is_refused(sentence):
    with pytest.raises(CompositionError) as error:
        needs.check(compose("dcpo", "cpu", ["algorithm.use_kl_in_reward=True"]))
    sentence(error.value, "algorithm.use_kl_in_reward=True", "plugins.dcpo.score_threshold")


@pytest.mark.parametrize("recipe", ["dcpo", "vade+dcpo", "kl_cov+dcpo"])
def test_recipes_combine(recipe):
    needs.check(compose(recipe, "cpu", []))
