"""Two actor ranks: every plugin that acts in the actor has its turn, in several micro-batches, metrics included."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_turn import COMPARED, DEPENDENT, TURNS
from training import SHORT, Training, ours, train

pytestmark = pytest.mark.e2e

TWO = ("trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2")
SETTINGS = (
    *SHORT,
    f"trainer.total_training_steps={len(TURNS)}",
    "actor_rollout_ref.rollout.full_determinism=true",
    "actor_rollout_ref.actor.ppo_epochs=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
    "actor_rollout_ref.actor.entropy_coeff=0.001",
)


@pytest.fixture(scope="module")
def two(third_party: Path, out: Path) -> Training:
    return train("in_turn", out / "two_ranks", *SETTINGS, *TWO, site=third_party)


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
