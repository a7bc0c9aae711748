"""Logits in real trainings: shaped on all sides, and looked at where a step of the optimiser would take them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from training import SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e


class TestStableMax:
    """Actor, reference and rollout server have the same policy, on a model that has learnt with it."""

    @pytest.fixture(scope="class")
    def run(self, out: Path) -> Training:
        settings = ("trainer.total_training_steps=2", "actor_rollout_ref.actor.use_kl_loss=true")
        return train("stablemax", out / "stablemax", *SHORT, *settings)

    def test_rollout_and_actor_agree(self, run: Training) -> None:
        healthy(run, 2)
        for step in run.steps:
            assert step["training/rollout_probs_diff_max"] < 1e-4
            assert step["training/rollout_actor_probs_pearson_corr"] > 0.9999

    def test_the_reference_is_the_policy_before_the_first_step(self, run: Training) -> None:
        assert run.steps[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6)

    def test_the_server_has_the_plugins(self, run: Training) -> None:
        assert "verl_plugins: rollout server (node" in run.log

    def test_the_model_was_made_for_it(self, run: Training, out: Path) -> None:
        made = Path(OmegaConf.load(run.out / "config.yaml").actor_rollout_ref.model.path)
        assert made.is_dir() and run.steps[0]["health/accuracy"] > 0.05

    def test_what_softmax_sees_is_told(self, run: Training) -> None:
        for step in run.steps:
            told = ours(step, "saturation")
            assert told["sc_token_share"] == 0  # it cannot saturate
            assert 0 < told["logit_abs_mean"] < told["logit_abs_max"] < math.log(1e4)


class TestGhosts:
    """A step with a thousand times the learning rate goes as far as log-softmax reaches."""

    @pytest.fixture(scope="class")
    def run(self, out: Path) -> Training:
        settings = ("trainer.total_training_steps=3", "actor_rollout_ref.actor.ppo_mini_batch_size=8")
        spike = "+plugins.lr_spike={step: 2, factor: 1000}"
        return train("ghosts_of_softmax", out / "ghosts", *SHORT, *settings, spike)

    def test_it_survives(self, run: Training) -> None:
        healthy(run, 3)
        assert run.steps[2]["health/accuracy"] > 0.5 * run.steps[0]["health/accuracy"]

    def test_the_spike_and_no_other_step(self, run: Training) -> None:
        rates = [ours(step, "lr_spike")["learning_rate"] for step in run.steps]
        assert rates == pytest.approx([5e-5, 5e-2, 5e-5])
        told = [ours(step, "ghosts_of_softmax") for step in run.steps]
        assert told[1]["capped"] == 1 and told[1]["r_proposed"] > 30
        assert told[1]["r_applied"] == pytest.approx(1)
        for step in (told[0], told[2]):
            assert step["r_applied"] <= 1 and step["r_proposed"] < 0.1 * told[1]["r_proposed"]
            assert step["update_norm"] < 0.01 * told[1]["update_norm"]
        assert all(step["probe_noise"] == 0 for step in told)
