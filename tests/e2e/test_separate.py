"""Mode separate_async: servers beside the training, several updates a step, weights sent by the gloo engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from training import PROMPTS, SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e

MODE = "trainer.v1.trainer_mode=separate_async"
EVICTED = "training/off_policy/evicted_samples"
UPDATES = 2
SPLIT = (
    f"trainer.v1.separate_async.parameter_sync_step={UPDATES}",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // UPDATES}",
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.rollout.n_gpus_per_node=2",
)


@pytest.fixture(scope="module")
def split(third_party: Path, out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, list[dict]]:
    """Two updates a step, two actor ranks and two servers beside them; every stage is written down."""
    folder = tmp_path_factory.mktemp("records")
    written = (
        f"plugins.every_stage.folder={folder}",
        "plugins.every_stage.queue=true",
        "trainer.total_training_steps=2",
    )
    training = train("every_stage", out / "separate", *SHORT, MODE, *SPLIT, *written, site=third_party)
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return training, lines


def of(lines: list[dict[str, Any]], stage: str, step: int) -> list[dict[str, Any]]:
    return [line for line in lines if line["stage"] == stage and line.get("step") == step]


class TestUpdates:
    """Two updates a step, each of whole groups."""

    def test_trains(self, split: tuple[Training, list[dict]]) -> None:
        healthy(split[0], 2, on_policy=False)

    @pytest.mark.parametrize("step", [1, 2])
    def test_how_often_each_stage_is_called(self, split: tuple[Training, list[dict]], step: int) -> None:
        counts = Counter(line["stage"] for line in split[1] if line.get("step") == step)
        each = ("shape_rewards", "select_rows", "estimate_advantage", "observe")
        assert {stage: counts[stage] for stage in each} == dict.fromkeys(each, UPDATES)
        assert counts["optimizer_step"] == 2 * UPDATES, "once an update on each of two ranks"
        assert counts["on_step_end"] == 1
        drawn = [len(line["ids"]) for line in of(split[1], "prepare_prompts", step)]
        assert sum(drawn) == PROMPTS * (1 + (step == 1)), "the first step also draws what is rolled out ahead"

    def test_groups_stay_whole_and_updates_are_counted(self, split: tuple[Training, list[dict]]) -> None:
        shaped = [line for step in (1, 2) for line in of(split[1], "shape_rewards", step)]
        assert [line["update"] for line in shaped] == [1, 2, 3, 4]
        assert [(line["groups"], line["rows"]) for line in shaped] == [(8, 64)] * 4

    def test_each_row_knows_how_old_it_is(self, split: tuple[Training, list[dict]]) -> None:
        """Rollouts of the first step are of the weights before it; those of the second were begun with them too."""
        training, lines = split
        for step in (1, 2):
            for place, line in enumerate(of(lines, "shape_rewards", step)):
                updates, steps = line["lag"]
                assert set(steps) <= set(range(step))
                assert updates == [UPDATES * age + place for age in steps]
            assert training.steps[step - 1]["health/lag_steps_max"] == pytest.approx(
                training.steps[step - 1]["training/off_policy/trajectory_staleness_worst/max"]
            )

    def test_every_update_has_the_old_policy_of_the_steps_start(self, split: tuple[Training, list[dict]]) -> None:
        """In the second update the policy has moved: if the old one were not put back, nothing would show it."""
        found = of(split[1], "policy_loss", 1)
        by_update = [[line["on_policy"] for line in found if line["place"][0] == update] for update in range(UPDATES)]
        assert max(by_update[0]) < 1e-4 < 1e-3 < max(by_update[1])
        for line in of(split[1], "estimate_advantage", 1):
            assert line["rollout_difference"] < 1e-3, "the servers have those very weights"

    def test_rows_left_out_leave_the_queue(self, split: tuple[Training, list[dict]]) -> None:
        for step in (1, 2):
            (line,) = of(split[1], "on_step_end", step)
            assert line["left_out"] == step * PROMPTS and line["kept"] == []

    def test_counts_of_the_updates_are_added_up(self, split: tuple[Training, list[dict]]) -> None:
        for step in split[0].steps:
            assert step["rollout/responses"] >= PROMPTS * 8
            assert step["rollout/tokens"] >= step["health/generated_tokens"] > 0
            assert step["weights/megabytes"] > 1


@pytest.fixture(scope="module")
def hybrid(out: Path) -> Training:
    """Servers of the actor's own help those beside it."""
    shared = (*SHORT, MODE, "actor_rollout_ref.hybrid_engine=true", "trainer.v1.sampler.max_off_policy_threshold=1")
    return train("vade+vcpo", out / "hybrid", *shared, "trainer.total_training_steps=4")


class TestHybrid:
    """Recipes vade and vcpo, with hybrid replicas."""

    def test_trains(self, hybrid: Training) -> None:
        assert [step["step"] for step in hybrid.steps] == [1, 2, 3, 4]
        for step in hybrid.steps:
            assert ours(step, "vade") and step["actor/grad_norm"] > 0

    def test_answers_that_are_too_old_are_thrown_away(self, hybrid: Training) -> None:
        """At a threshold of one step, what was begun in the step before is not trained on."""
        assert all(step["health/lag_steps_max"] == 0 for step in hybrid.steps)
        assert sum(step.get(EVICTED, 0) for step in hybrid.steps) > 0

    def test_steps_follow_the_effective_sample_size(self, hybrid: Training) -> None:
        """Of all rows at once, since an update has the whole batch; on rollouts of the same weights steps are whole."""
        for step in hybrid.steps:
            found = ours(step, "vcpo")
            assert found["ess_ratio"] == pytest.approx(step["health/effective_sample_size"], rel=1e-3)
            assert found["lr_multiplier"] == pytest.approx(min(1.0, found["ess_ratio"]) ** 0.5)
            assert found["effective_lr"] == pytest.approx(found["lr_multiplier"] * step["actor/lr"])
            assert found["skipped"] == 0 and found["score_norm_mean"] > 0
            if step["health/lag_max"] == 0:
                assert found["ess_ratio"] == pytest.approx(1, abs=1e-4)

    def test_prompts_are_chosen(self, hybrid: Training) -> None:
        seen = [ours(step, "vade")["seen_fraction"] for step in hybrid.steps]
        assert seen == sorted(seen) and seen[2] > seen[1]
