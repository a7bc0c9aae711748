"""Runs in `separate_async` that are saved, killed and gone on with; four updates a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Running
from training import PROMPTS, SHORT, Training, healthy, ours, train

MODE = "trainer.v1.trainer_mode=separate_async"
HYBRID = ("actor_rollout_ref.hybrid_engine=true", "trainer.v1.sampler.max_off_policy_threshold=1")
UPDATES = 4
SPLIT = (
    f"trainer.v1.separate_async.parameter_sync_step={UPDATES}",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // UPDATES}",
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.rollout.n_gpus_per_node=2",
)


@pytest.mark.parametrize("how", [(), HYBRID, SPLIT], ids=["one_update", "hybrid", "four_updates"])
def test_a_run_that_is_killed_goes_on(out: Path, how: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    """`kill -9` after a checkpoint; the next command trains on from it, and vade knows what it had seen."""
    run = Running(out / request.node.callspec.id, MODE, *how)
    try:
        run.until(2).process.kill()
        run.ended()
    finally:
        run.end()
    steps = max(run.steps) + 2
    resumed = train("vade", run.out, *SHORT, MODE, *how, f"trainer.total_training_steps={steps}", "trainer.save_freq=1")
    assert "resuming after step" in resumed.output
    assert [step["step"] for step in resumed.steps] == list(range(1, steps + 1))
    seen = [ours(step, "vade")["seen_fraction"] for step in resumed.steps]
    assert seen == sorted(seen) and seen[-1] > seen[1]


@pytest.fixture(scope="module")
def saved(out: Path) -> list[Training]:
    """Hybrid replicas, stopped in order after two steps, and gone on with to the fourth."""
    words = (*SHORT, MODE, *HYBRID, "trainer.save_freq=2")
    return [train("vade+vcpo", out / "saved", *words, f"trainer.total_training_steps={steps}") for steps in (2, 4)]


def test_hybrid_replicas_are_gone_on_with(saved: list[Training]) -> None:
    assert [step["step"] for step in saved[1].steps] == [1, 2, 3, 4]
    assert "resuming after step 2" in saved[1].output
    assert all(ours(step, "vcpo")["ess_ratio"] > 0 for step in saved[1].steps)


def test_four_updates_a_step(out: Path) -> None:
    """The batch is split into four, each update has its own rows; clip_cov's loss sees the policy move away."""
    training = train("vade+clip_cov", out / "four", *SHORT, MODE, *SPLIT, "trainer.total_training_steps=3")
    healthy(training, 3, on_policy=False)
    assert training.steps[-1]["health/lag_max"] >= UPDATES
    for step in training.steps:
        assert step["training/off_policy/trajectory_staleness/max"] <= step["step"] - 1
