"""RAVL on two ranks: three heads, answers that are cut off, and heads that go on from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor  # its classes, which shards are made of
from training import SHORT, Training, ours, train

pytestmark = pytest.mark.e2e

STEPS, HEADS, RANKS = 2, 3, 2
SETTINGS = (
    *SHORT,
    "plugins.ravl.members=3",
    f"trainer.n_gpus_per_node={RANKS}",
    "data.max_response_length=2",
    "critic.optim.lr=1e-3",
    "critic.ppo_mini_batch_size=8",
    "trainer.save_freq=1",
)
"""An answer of one digit and an end has room; one of two digits is cut off before it ends."""


@pytest.fixture(scope="module")
def trained(out: Path) -> Training:
    """One step, and one more in a second command."""
    train("ravl", out / "ravl", *SETTINGS, "trainer.total_training_steps=1")
    return train("ravl", out / "ravl", *SETTINGS, f"trainer.total_training_steps={STEPS}", "trainer.resume_mode=auto")


def test_it_trains_and_says_what_it_saw(trained: Training) -> None:
    assert [step["step"] for step in trained.steps] == list(range(1, STEPS + 1))
    for step in trained.steps:
        assert step["actor/grad_norm"] > 0.01 and step["training/rollout_probs_diff_max"] < 1e-3
        found = ours(step, "ravl")
        assert 0 < found["truncated_frac"] < 1
        assert found["truncated_frac"] == pytest.approx(step["health/truncated"], abs=1e-6)
        assert found["ensemble_std_interior"] > 0 and found["ensemble_std_boundary"] > 0
        assert math.isfinite(found["bootstrap_mean"]) and -0.5 * HEADS <= found["diversity"] <= HEADS
        assert step["critic/grad_norm"] > 0 and step["critic/vf_loss"] != 0


def test_advantages_are_those_of_the_smallest_values(trained: Training) -> None:
    """verl's own metrics: GAE whitens, and with gamma = lam = 1 a return has the reward, and what follows a cut."""
    for step in trained.steps:
        assert step["critic/advantages/mean"] == pytest.approx(0, abs=1e-5)
        assert step["critic/values/min"] <= step["critic/values/mean"] < step["critic/vpred_mean"]
        lowest = ours(step, "ravl")["bootstrap_mean"]
        assert step["critic/returns/min"] <= lowest or lowest > 0


def head(trained: Training, step: int) -> torch.Tensor:
    """[N,D] from the ranks' shards."""
    parts = []
    for rank in range(RANKS):
        file = trained.out / f"global_step_{step}/critic/model_world_size_{RANKS}_rank_{rank}.pt"
        weight = next(value for name, value in torch.load(file, weights_only=True).items() if name == "score.weight")
        parts.append(weight)
    return torch.cat([part.to_local() for part in parts], dim=parts[0].placements[0].dim)


def test_heads_are_saved_and_go_on_from_there(trained: Training) -> None:
    one, two = head(trained, 1), head(trained, 2)
    assert one.shape == two.shape and one.shape[0] == HEADS
    moved = (two - one).abs().amax()
    assert 0 < moved < 0.005, "two steps of Adam at 1e-3, not heads drawn anew"
    assert "resuming after step 1" in trained.output
