"""Two actor ranks: every plugin that acts in the actor has its turn, in several micro-batches, metrics included.

One rank's training beside it says what the split must not change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from in_turn import COMPARED, DEPENDENT, TURNS
from training import SHORT, Training, ours, train

pytestmark = pytest.mark.e2e

TWO = "trainer.n_gpus_per_node=2"
SETTINGS = (
    *SHORT,
    "actor_rollout_ref.rollout.full_determinism=true",
    "actor_rollout_ref.actor.ppo_epochs=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
    "actor_rollout_ref.actor.entropy_coeff=0.001",
    "+plugins.perp_grad={}",
    "+plugins.ghosts_of_softmax={mode: diagnose, probe_tokens: 100000}",
    "+plugins.saturation={probe_tokens: 100000}",
)
MEASURED = ("logit_abs_max", "logit_abs_mean", "sc_token_share")


@pytest.fixture(scope="module")
def two(third_party: Path, out: Path) -> Training:
    steps = f"trainer.total_training_steps={len(TURNS)}"
    return train("in_turn", out / "two_ranks", *SETTINGS, TWO, steps, site=third_party)


@pytest.fixture(scope="module")
def one(third_party: Path, out: Path) -> Training:
    steps = f"trainer.total_training_steps={len(COMPARED)}"
    return train("in_turn", out / "one_rank", *SETTINGS, steps, site=third_party)


@pytest.mark.parametrize("turn", range(len(COMPARED)), ids=[name for name, _ in COMPARED])
def test_loss_and_gradient_are_those_of_one_rank(one: Training, two: Training, turn: int) -> None:
    alone, shared = one.steps[turn], two.steps[turn]
    for key in ("actor/loss", "actor/grad_norm", "actor/entropy", "health/reward", "health/generated_tokens"):
        assert shared[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-4), key


def test_gradients_split_over_ranks_are_projected_as_on_one(one: Training, two: Training) -> None:
    for alone, shared in zip(one.steps, two.steps, strict=False):
        a, b = ours(alone, "perp_grad"), ours(shared, "perp_grad")
        assert b["cos_w_g_max_abs"] > 0
        for key in ("cos_w_g_mean", "cos_w_g_max_abs", "removed_norm_share"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key


def test_effects_on_logits_are_the_largest_of_all_ranks(one: Training, two: Training) -> None:
    for name, keys in (("ghosts_of_softmax", ("r_proposed", "delta_a", "update_norm")), ("saturation", MEASURED)):
        for alone, shared in zip(one.steps, two.steps, strict=False):
            for key in keys:
                assert ours(shared, name)[key] == pytest.approx(ours(alone, name)[key], rel=0.01, abs=1e-5), key


def test_each_has_its_turn(two: Training) -> None:
    assert [step["step"] for step in two.steps] == list(range(1, len(TURNS) + 1))
    assert "actor worker 1" in two.log
    for step, (name, _) in zip(two.steps, TURNS, strict=True):
        assert ours(step, name)
        assert step["actor/grad_norm"] > 0


def test_verls_own_metrics_stay_whatever_loss_is_in_place(two: Training) -> None:
    for step in two.steps:
        assert {"actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"} <= step.keys()


def test_metrics_that_only_some_micro_batches_log_arrive(two: Training) -> None:
    names = [name for name, _ in TURNS]
    assert two.steps[names.index("epo")]["plugins/loss_terms/epo_smooth"] != 0
    by_call = len(COMPARED) + [name for name, _ in DEPENDENT].index("clip_cov")
    found = ours(two.steps[by_call], "clip_cov")
    assert found["num_candidates"] > found["num_selected"] > 0
