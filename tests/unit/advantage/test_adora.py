"""ADORA: the advantages of a group weighed by the lengths of its right and wrong answers."""

from __future__ import annotations

import pytest
import torch
from advantages import outcomes
from fakes import FakeRun, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.advantage.adora import Adora, Lengths, is_advantageous
from verl_plugins.advantage.grpo import Grpo
from verl_plugins.advantage.mc_grpo import McGrpo
from verl_plugins.composition.manager import Plugins

FEW = settings(max_examples=50, deadline=None)
BUDGET, END = 9, FakeTokenizer.eos_token_id
VARIANTS = st.sampled_from(["llm", "vlm", "paper_llm"])


def batch_of(uid, scores, lengths, width: int = BUDGET, dtype=torch.float32, full=None, **fields) -> Batch:
    """Responses of these lengths, the score on the last token; of BUDGET tokens they did not end, shorter ones did."""
    lengths = torch.as_tensor(lengths)
    mask = torch.arange(width) < lengths[:, None]
    rewards = torch.zeros(mask.shape, dtype=dtype)
    rewards[:, 0] = torch.as_tensor(scores, dtype=dtype)
    responses = torch.where(torch.arange(width) == lengths[:, None] - 1, END, 7) * mask
    responses[lengths == BUDGET] = 7
    given = {"response_mask": mask, "response_lengths": lengths, "responses": responses} | fields
    return Batch.from_tensors(uid=uid, rm_scores=rewards, tokenizer=FakeTokenizer(), budget=BUDGET, full=full, **given)


def weigh(batch: Batch, run=None, advantages=None, **options) -> torch.Tensor:
    """The factor of each row, applied to advantages of 1."""
    stage = Adora(Adora.Config(**options)).estimate_advantage(run or FakeRun(), batch)
    next(stage)
    ones = torch.ones(len(batch), batch.response_mask.shape[1])
    with pytest.raises(StopIteration) as end:
        stage.send(ones if advantages is None else advantages)
    return end.value.value[:, 0] if advantages is None else end.value.value


def one_prompt(*responses: tuple[float, int], **options) -> float:
    """The weight of a prompt whose responses have these (score, length)."""
    scores, lengths = zip(*responses, strict=True)
    found = weigh(batch_of(["1-1-0"] * len(responses), scores, lengths), **options)
    assert len(found.unique()) == 1
    return pytest.approx(float(found[0]))


@st.composite
def responses(draw) -> tuple[list[str], list[float], list[int]]:
    """uid, score and length of each row."""
    uid, scores = draw(outcomes())
    return uid, scores, draw(st.lists(st.integers(1, BUDGET), min_size=len(uid), max_size=len(uid)))


class TestRules:
    """The table of the recipe's page: weight by rule, llm, vlm and paper_llm."""

    @pytest.mark.parametrize(
        ("group", "weights"),
        [
            ([(1, 6), (0, 2), (0, 4)], (1, 1, 2)),  # the longest success beats the mean failure
            ([(1, 3), (0, 3), (0, 3)], (0.1, 0.1, 1)),  # equal lengths are no advantage
            ([(1, 2), (1, 6), (0, 4)], (1, 1, 1)),  # successes are more than half
            ([(1, 2), (0, 5), (0, BUDGET)], (0.1, 0.1, 1)),  # the failure that was cut off does not count
            ([(1, 6), (0, 5), (0, BUDGET)], (1, 1, 2)),  # with it, the mean would be 7
            ([(0, 2), (0, 4)], (0.1, 1, 1)),  # no success
            ([(1, 2), (1, 4)], (1, 0.1, 1)),  # no failure, but the success rate is 1
            ([(1, 2), (0, BUDGET), (0, BUDGET)], (1, 0.1, 2)),  # all failures cut off
            ([(0, BUDGET), (0, BUDGET)], (0.1, 1, 1)),  # neither
            ([(1, BUDGET), (0, 5)], (1, 1, 2)),  # a success may be cut off
        ],
    )
    def test_weights(self, group, weights):
        found = [one_prompt(*group, variant=variant) for variant in ("llm", "vlm", "paper_llm")]
        assert tuple(found) == weights

    def test_the_success_rate_counts_responses_that_were_cut_off(self):
        group = [(1, 6), (1, 6), (0, 2), (0, BUDGET)]
        assert one_prompt(*group, variant="paper_llm") == 2
        assert one_prompt(*group, variant="paper_llm", success_rate_tau=0.4) == 1

    def test_the_weights_are_settings(self):
        assert one_prompt((1, 2), (0, 4), tds_weight=0.0) == 0
        assert one_prompt((1, 5), (0, 4), variant="paper_llm", tas_weight=3.0) == 3

    def test_an_empty_response_is_a_failure_of_length_0(self):
        assert one_prompt((1, 2), (0, 0), (0, 5)) == 0.1
        assert one_prompt((1, 3), (0, 0), (0, 5)) == 1

    def test_a_score_at_the_threshold_fails(self):
        assert one_prompt((0.5, 6), (0, 4), (1, 2), correct_score=0.5) == 0.1
        assert one_prompt((0.5, 6), (0, 4), (1, 2), correct_score=0.4) == 1

    def test_a_threshold_of_length(self):
        group = [(1, 4), (0, 3), (0, 7)]
        assert one_prompt(*group) == 0.1
        assert one_prompt(*group, max_length_threshold=7) == 1
        assert one_prompt(*group, max_length_threshold=8) == 0.1


class TestLaws:
    @FEW
    @given(responses(), st.randoms(use_true_random=False), VARIANTS)
    def test_row_order_does_not_matter(self, rows, random, variant):
        order = random.sample(range(len(rows[0])), len(rows[0]))
        found = weigh(batch_of(*([column[row] for row in order] for column in rows)), variant=variant)
        assert torch.equal(weigh(batch_of(*rows), variant=variant)[order], found)

    @FEW
    @given(responses(), VARIANTS)
    def test_one_weight_per_group(self, rows, variant):
        batch = batch_of(*rows)
        found = weigh(batch, variant=variant)
        assert torch.equal(batch.groups.min(found), batch.groups.max(found))

    @FEW
    @given(responses(), VARIANTS, st.floats(0.5, 4))
    def test_the_size_of_scores_does_not_matter(self, rows, variant, scale):
        uid, scores, lengths = rows
        verdict = [float(score > 0.5) for score in scores]
        one = weigh(batch_of(uid, scores, lengths, verdict=verdict), variant=variant)
        other = weigh(batch_of(uid, [scale * s for s in scores], lengths, verdict=verdict), variant=variant)
        assert torch.equal(one, other)

    @FEW
    @given(responses(), VARIANTS)
    def test_dtype_and_padding_width_do_not_matter(self, rows, variant):
        wide = batch_of(*rows, width=BUDGET + 4, dtype=torch.float64)
        assert torch.equal(weigh(batch_of(*rows), variant=variant), weigh(wide, variant=variant))

    def test_tokens_the_policy_did_not_generate_have_no_length(self):
        batch = batch_of(["1-1-0"] * 2, [1, 0], [6, 4])
        mask = batch.response_mask.clone()
        mask[0, 1:4] = False  # three tokens of the success come from a tool
        fields = {name: batch._source.fetch(name) for name in ("response_lengths", "responses")}
        other = batch_of(["1-1-0"] * 2, [1, 0], [6, 4], response_mask=mask, **fields)
        assert (weigh(batch)[0], weigh(other)[0]) == (1, pytest.approx(0.1))

    def test_each_session_by_its_last_output(self):
        uid, fields = ["1-1-0"] * 4, {"session": [0, 0, 1, 2], "turn": [0, 1, 0, 0]}
        found = weigh(batch_of(uid, [0, 1, 0, 0], [8, 2, 3, 3], **fields))
        assert found.tolist() == pytest.approx([0.1] * 4)


class TestWrapper:
    """Around any estimator."""

    ROWS = ["1-1-0"] * 3 + ["2-1-0"] * 3, [1.0, 0, 0, 1, 0, 0], [2, 3, 3, 4, 3, 3]

    def test_a_response_in_segments_is_as_long_as_all_of_it(self):
        """Of last segments of 2, 3 and 3 tokens the success is the shortest, of what they end the longest."""
        rows, ends = (["1-1-0"] * 3, [1.0, 0.0, 0.0]), [2, 3, 3]
        last = batch_of(*rows, ends, truncated=[0, 0, 0], offset=torch.tensor([5, 0, 2]))
        assert float(weigh(last)[0]) == float(weigh(batch_of(*rows, [7, 3, 5]))[0]) == 1
        assert float(weigh(batch_of(*rows, ends))[0]) == pytest.approx(0.1)

    def test_multiplies_what_the_estimator_gives(self):
        batch, plugins = batch_of(*self.ROWS), [Grpo(Grpo.Config()), Adora(Adora.Config())]
        plain, found = (
            Plugins(chosen).hook.estimate_advantage(run=FakeRun(), batch=batch) for chosen in (plugins[:1], plugins)
        )
        expected = plain.clone()
        expected[:3] *= 0.1
        assert torch.equal(found, expected)
        assert plain.abs().sum() > 0

    def test_leaves_the_estimators_tensor_alone(self):
        given = torch.ones(6, BUDGET)
        weigh(batch_of(*self.ROWS), advantages=given)
        assert (given == 1).all()

    def test_rows_that_were_dropped_still_speak_for_their_group(self):
        full = batch_of(*self.ROWS)
        rows = [1, 2, 4, 5]  # both successes are gone
        part = batch_of(*([column[row] for row in rows] for column in self.ROWS), session=rows, full=full)
        assert weigh(part).tolist() == pytest.approx([0.1, 0.1, 1, 1])
        assert weigh(batch_of(*([column[row] for row in rows] for column in self.ROWS))).tolist() == pytest.approx(
            [0.1] * 4
        )

    def test_around_the_median(self):
        batch = batch_of(*self.ROWS)
        plugins = Plugins([McGrpo(McGrpo.Config()), Adora(Adora.Config())])
        found = plugins.hook.estimate_advantage(run=FakeRun(), batch=batch)
        assert found[:, 0].tolist() == pytest.approx([100, 0, 0, 1000, 0, 0])


class TestRefusals:
    def test_a_threshold_beyond_the_budget(self, sentence):
        plugin = Adora(Adora.Config(max_length_threshold=3900))
        with pytest.raises(CompositionError) as error:
            plugin.check(OmegaConf.create({"data": {"max_response_length": 2048}}))
        sentence(error.value, "plugins.adora.max_length_threshold=3900", "data.max_response_length=2048")
        plugin.check(OmegaConf.create({"data": {"max_response_length": 3900}}))

    def test_a_threshold_beyond_the_budget_of_a_prompt(self, sentence):
        fields = {"__max_tokens__": torch.tensor([9, 9, 9, 5, 5, 5])}
        with pytest.raises(DataError) as error:
            weigh(batch_of(*TestWrapper.ROWS, **fields), max_length_threshold=6)
        sentence(error.value, "plugins.adora.max_length_threshold=6", "budget of 5 tokens")
        weigh(batch_of(*TestWrapper.ROWS, **fields), max_length_threshold=5)

    def test_a_score_that_nothing_exceeds(self, sentence):
        with pytest.raises(DataError) as error:
            weigh(batch_of(*TestWrapper.ROWS), correct_score=1.01)
        sentence(error.value, "plugins.adora.correct_score=1.01", "the largest is 1", "2 responses right")

    def test_a_batch_without_any_success_is_not_refused(self):
        assert weigh(batch_of(["1-1-0"] * 2, [0, 0.2], [3, 4]), correct_score=1.01).tolist() == pytest.approx([0.1] * 2)

    def test_scores_lowered_by_kl(self, sentence):
        config = OmegaConf.create({"algorithm": {"use_kl_in_reward": True}})
        with pytest.raises(CompositionError) as error:
            Adora(Adora.Config(correct_score=0.5)).check(config)
        sentence(error.value, "plugins.adora.correct_score=0.5", "algorithm.use_kl_in_reward=true")
        Adora(Adora.Config()).check(config)


def test_metrics():
    run = FakeRun()
    uid = [f"{prompt}-1-0" for prompt in (1, 1, 1, 2, 2, 3, 3)]
    batch = batch_of(uid, [1, 0, 0, 1, 1, 0, 0], [6, 2, BUDGET, 3, 4, 2, 5])
    advantages = torch.zeros(7, BUDGET)
    advantages[:3, 1] = torch.tensor([1.0, -0.5, -0.5])
    weigh(batch, run, advantages)
    assert run.metrics == pytest.approx(
        {
            "frac_tas": 2 / 3,  # the first prompt, and the second, which has no failure
            "frac_tds": 1 / 3,
            "weight_mean": 0.7,
            "weight_mean_nonzero": 1.0,
            "frac_no_success": 1 / 3,
            "frac_no_failure": 1 / 3,
            "max_success_len_mean": 5.0,
            "mean_fail_len_mean": 2.75,
            "truncated_failures": 0.25,
        }
    )


def test_by_the_papers_rule_a_prompt_that_is_mostly_solved_weighs_no_more():
    longer = Lengths(torch.full((3,), 9.0), torch.full((3,), 4.0), torch.tensor([0.25, 0.5, 0.75]))
    assert is_advantageous(longer, "paper_llm").tolist() == [True, True, False]
