"""A teacher beside the reward, on two ranks: its server, an auxiliary head of its own, and what is saved of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training import SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e

SETTINGS = (
    *SHORT,
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    "plugins.dhkd.head=lowrank",
    "plugins.dhkd.rank=8",
    "plugins.dhkd.align_gradients=true",
    "+plugins.clip_cov={}",
)
PARTS = {f"{name}{part}" for name in ("a", "b") for part in ("", ".step", ".exp_avg", ".exp_avg_sq")}


@pytest.fixture(scope="module")
def run(out: Path) -> Training:
    return train("dhkd", out / "dhkd", *SETTINGS)


def test_it_trains(run: Training) -> None:
    healthy(run, 2)


def test_the_teacher_is_asked_and_is_sure_of_itself(run: Training) -> None:
    for step in run.steps:
        assert 0.9 < step["actor/distillation/teacher_mass"] < 1 + 1e-4
        assert step["actor/distillation/teacher_mass"] > step["actor/distillation/student_mass"] - 0.05
        assert (
            step["actor/distillation/loss"] > 0
            and step["actor/distillation/loss_max"] > step["actor/distillation/loss_min"] >= 0
        )


def test_the_loss_is_that_of_the_auxiliary_head(run: Training) -> None:
    first, second = (ours(step, "dhkd") for step in run.steps)
    assert first["aux_loss"] > 0 and second["aux_loss"] > 0
    assert first["head_vs_aux_kl"] == pytest.approx(0, abs=1e-6)  # it begins as the policy's
    assert second["head_vs_aux_kl"] > 1e-9
    assert {first["grad_dot_sign"], second["grad_dot_sign"]} <= {-1.0, 1.0}


def test_a_plugin_of_the_policy_loss_acts_beside_it(run: Training) -> None:
    for step in run.steps:
        assert ours(step, "clip_cov") and "actor/pg_clipfrac" in step


def test_the_head_is_saved_with_the_plugin_and_is_in_no_model(run: Training) -> None:
    folder = next(run.out.rglob("global_step_2"))
    state = json.loads((folder / "plugins" / "state.json").read_text())["states"]["actor"]["dhkd"]
    assert {*state["torch"]} == PARTS
    with safe_open(folder / "plugins" / "arrays.safetensors", "pt") as arrays:
        assert arrays.get_tensor("actor/dhkd/b").any()
    exported = {}
    for file in (folder / "actor" / "huggingface").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            exported |= dict.fromkeys(tensors.keys())
    assert len(exported) == 27 and "lm_head.weight" in exported
    shard = torch.load(folder / "actor" / "model_world_size_2_rank_0.pt", weights_only=False)
    assert shard.keys() == exported.keys()
