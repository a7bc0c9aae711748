"""GRPO: verl's numbers, but exact zeros, and nothing for a group of one."""

from __future__ import annotations

import pytest
import torch
from advantages import batch_of, outcomes, per_row
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import CompositionError, DataError, Groups
from verl_plugins.advantage.grpo import Grpo, grpo_advantage

FEW = settings(max_examples=50, deadline=None)


def estimate(uid, scores, run=None, scale="std", **fields) -> torch.Tensor:
    return Grpo(Grpo.Config(scale=scale)).estimate_advantage(run or FakeRun(), batch_of(uid, scores, **fields))


@FEW
@given(outcomes(), st.randoms(use_true_random=False), st.sampled_from(["std", "none"]))
def test_row_order_and_names_do_not_matter(rows, random, scale):
    uid, scores = rows
    order = random.sample(range(len(uid)), len(uid))
    renamed = [f"9{uid[row]}x" for row in order]
    one, other = estimate(uid, scores, scale=scale), estimate(renamed, [scores[row] for row in order], scale=scale)
    torch.testing.assert_close(per_row(one)[order], per_row(other), rtol=1e-5, atol=1e-6)


@FEW
@given(outcomes(distinct=True), st.floats(0.5, 8), st.floats(-4, 4))
def test_shift_and_scale(rows, factor, shift):
    uid, scores = rows
    moved = [factor * score + shift for score in scores]
    torch.testing.assert_close(estimate(uid, scores), estimate(uid, moved), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        factor * estimate(uid, scores, scale="none"), estimate(uid, moved, scale="none"), rtol=1e-3, atol=1e-4
    )


@FEW
@given(outcomes())
def test_sums_to_zero_in_every_group_and_float32_suffices(rows):
    uid, scores = rows
    advantage = per_row(estimate(uid, scores))
    for group in set(uid):
        assert advantage[[name == group for name in uid]].sum().item() == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(advantage, per_row(estimate(uid, scores, dtype=torch.float64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("apart", [1e-6, 1e-5, 0.5])
def test_what_is_added_to_the_std_is_verls(apart):
    """1e-6, which halves the advantage of rewards that are as little apart."""
    scores = torch.tensor([0.0, apart * 2**0.5], dtype=torch.float64)
    found = grpo_advantage(scores, Groups(["a", "a"]))
    half = apart / 2**0.5
    assert found.tolist() == pytest.approx([-half / (apart + 1e-6), half / (apart + 1e-6)])


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, 0.7, 1 / 3, -2.3, 1e6])
@pytest.mark.parametrize("size", [1, 2, 8, 12, 64, 500])
def test_equal_groups_are_exactly_zero(size, score, scale):
    assert (estimate(["1-1-0"] * size, [score] * size, scale=scale) == 0).all()


def test_wider_padding_and_empty_masks():
    uid, scores = ["1-1-0"] * 3, [1.0, 0.0, 0.5]
    narrow, wide = estimate(uid, scores), estimate(uid, scores, tokens=9)
    assert torch.equal(per_row(narrow), per_row(wide))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0] = False
    found = estimate(uid, scores, response_mask=mask)
    assert (found[0] == 0).all(), "no token, no advantage"
    assert torch.equal(found[1], per_row(narrow)[1].expand(4)), "its score counts all the same"


def test_outputs_of_a_session_share_the_advantage_of_its_last():
    uid = ["1-1-0"] * 4
    scores = [9.0, 1.0, 0.0, 0.0]  # the first is an earlier output of the second
    found = per_row(estimate(uid, scores, session=[0, 0, 1, 2], turn=[0, 1, 0, 0]))
    expected = per_row(estimate(uid[1:], scores[1:]))
    assert torch.allclose(found, expected[[0, 0, 1, 2]])


def test_metrics():
    run = FakeRun()
    estimate(["1-1-0"] * 2 + ["2-1-0"] * 3, [1.0, 1.0, 1.0, 0.0, 0.0], run)
    assert run.metrics == {"zero_advantage_rows": pytest.approx(0.4), "group_size_min": 2}


def test_nan_is_refused():
    with pytest.raises(DataError, match="finite"):
        estimate(["1-1-0"] * 2, [1.0, float("nan")])


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"actor_rollout_ref": {"rollout": {"n": 1}}}, "actor_rollout_ref.rollout.n=1"),
        ({"algorithm": {"norm_adv_by_std_in_grpo": False}}, "plugins.grpo.scale=none"),
    ],
)
def test_impossible_settings(overrides, names, sentence):
    with pytest.raises(CompositionError) as error:
        Grpo(Grpo.Config()).check(OmegaConf.create(overrides))
    sentence(error.value, names)


def test_possible_settings():
    Grpo(Grpo.Config()).check(OmegaConf.create({}))
    Grpo(Grpo.Config(scale="none")).check(OmegaConf.create({"algorithm": {"norm_adv_by_std_in_grpo": False}}))
