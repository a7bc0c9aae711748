"""Roles and anchors on two ranks: every part of both papers in one training, of two roles with one policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training import SHORT, Training, healthy, ours, train
from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.cpu.roles import RolesSettings, write_task

pytestmark = pytest.mark.e2e

STEPS, ANCHORS, PROMPTS, GROUP = 3, 4, 16, 8
ROLES = ("planner", "solver")


@pytest.fixture(scope="module")
def run(out: Path) -> Training:
    folder = out / "roles"
    write_task(folder, RolesSettings(train_rows=256, val_rows=16))
    files = {side: (folder / f"{side}.parquet", folder / f"{side}_anchored.parquet") for side in ("train", "val")}
    words = [files["train"][0], "--to", files["train"][1], "--val", files["val"][0], "--val-to", files["val"][1]]
    done = CliRunner().invoke(app, ["data", "anchors", *map(str, words), "--anchors", str(ANCHORS)])
    assert done.exit_code == 0, done.output
    return train(
        "exploration_cooperation+ecr+portfolio_mixture",
        folder / "run",
        *SHORT[1:],
        "trainer.n_gpus_per_node=2",
        f"trainer.total_training_steps={STEPS}",
        f"data.train_files={files['train'][1]}",
        f"data.val_files={files['val'][1]}",
        "actor_rollout_ref.rollout.val_kwargs.n=1",
        f"trainer.rollout_data_dir={folder}/rollouts",
        f"trainer.validation_data_dir={folder}/validations",
        "plugins.role_metrics.decision=decision",
        "plugins.role_metrics.window=2",
        "plugins.gradient_coupling.every=2",
        "plugins.portfolio_mixture.column=anchor_id",
        "plugins.portfolio_mixture.mode=eg",
        "plugins.portfolio_mixture.scale=0",
        preset="roles",
    )


def asked(folder: Path) -> list[str]:
    """The prompts of a dump."""
    return [json.loads(line)["input"] for line in folder.read_text().splitlines()]


def test_both_roles_are_trained(run: Training) -> None:
    healthy(run, STEPS, equal_groups=False)
    assert "actor worker 1" in run.log
    for step in run.steps:
        assert 0.1 < step["health/accuracy"] < 0.9


def test_roles_of_the_agent_loop_reach_the_metrics(run: Training) -> None:
    for step in run.steps:
        found = ours(step, "role_metrics")
        assert found["roles"] == 2
        for role in ROLES:
            assert found[f"{role}/rows"] == PROMPTS * GROUP
            assert found[f"{role}/reward"] == pytest.approx(step["health/reward"], abs=1e-6)
            assert 0.1 < found[f"{role}/decision_rate"] < 0.95
            assert 0 < found[f"{role}/entropy"] < 2 and 0.5 < found[f"{role}/action_gap"] < 20
        assert found["reward_spread"] == pytest.approx(0, abs=1e-6)
        low, high = sorted(found[f"{role}/action_gap"] for role in ROLES)
        assert low <= found["action_gap"] <= high
    assert ["alarm" in ours(step, "role_metrics") for step in run.steps] == [False, True, True]
    assert [ours(step, "role_metrics").get("alarm") for step in run.steps[1:]] == [0, 0]


def test_gradients_of_roles_are_compared_in_the_steps_that_are_due(run: Training) -> None:
    found = [ours(step, "gradient_coupling") for step in run.steps]
    assert found[1] == {}
    for one in (found[0], found[2]):
        assert one["roles"] == 2
        assert -1 < one["mean_cosine"] < 1 and one["mean_cosine"] != 0
        assert one["conflict_fraction"] == (one["mean_cosine"] < 0)
        assert 0 < one["coherence"] <= 1


def test_prompts_tell_exploration_progress_and_anchor(run: Training) -> None:
    folder = run.out.parent
    for step, part in ((1, 1), (2, 4), (3, 7)):
        assert ours(run.steps[step - 1], "state_augmentation") == {"tenth": part}
        found = asked(folder / f"rollouts/{step}.jsonl")
        assert all(f"[explore=high step={part}/10]<topic_0" in prompt for prompt in found)
        assert any("plan" in prompt for prompt in found) and any("solve" in prompt for prompt in found)
    validated = asked(folder / "validations/0.jsonl")
    assert validated and all("[explore=high step=10/10]<topic_0" in prompt for prompt in validated)


def test_anchors_are_strata(run: Training) -> None:
    for step in run.steps:
        found = ours(step, "anchor_strata")
        assert (found["anchors"], found["evenness"]) == (ANCHORS, pytest.approx(1))
        rewards = [found[f"{anchor}/reward"] for anchor in range(ANCHORS)]
        assert sum(rewards) / ANCHORS == pytest.approx(step["health/reward"], abs=1e-6)
        assert all(found[f"{anchor}/entropy"] > 0 for anchor in range(ANCHORS))
        drawn = ours(step, "portfolio_mixture")
        assert [drawn[f"prompts_{anchor}"] for anchor in range(ANCHORS)] == [PROMPTS / ANCHORS] * ANCHORS
