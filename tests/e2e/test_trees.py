"""Recipe spo_tree: responses in segments, rows of earlier steps, a step without a signal, and a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from training import PROMPTS, SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e

TREES = ("plugins.spo_tree.branches=[4,3,2]", "plugins.spo_tree.segment_tokens=1", "plugins.spo_tree.rows_per_prompt=4")
ROWS = 128
"""Of a step, as many as an update has: the fewer there are, the oftener each comes."""


def whole_run(folder: Path) -> list[str]:
    return [
        *SHORT,
        *TREES,
        f"plugins.spo_tree.rows={ROWS}",
        "+plugins.alike={}",
        "actor_rollout_ref.rollout.full_determinism=true",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
        "trainer.total_training_steps=3",
        "trainer.save_freq=1",
    ]


@pytest.fixture(scope="module")
def whole(out: Path, third_party: Path) -> Training:
    """Mode sync: a step in which all leaves are alike, one with fresh rows, and one with rows that waited."""
    return train("spo_tree", out / "spo_tree", *whole_run(out / "spo_tree"), site=third_party)


@pytest.fixture(scope="module")
def resumed(whole: Training, out: Path, third_party: Path) -> Training:
    folder = out / "spo_tree_resumed"
    path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={whole.out / 'global_step_2'}")
    return train("spo_tree", folder, *whole_run(folder), *path, site=third_party)


def rows(training: Training, step: int) -> list[dict]:
    """What was trained on, as verl dumps it, without verl's padding."""
    lines = (training.out / f"rollouts/{step}.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if not row["uid"].startswith("pad")]


def born(row: dict) -> int:
    return int(row["uid"].split("-")[1])


class TestSync:
    def test_a_step_in_which_all_are_alike_is_not_trained_on(self, whole: Training) -> None:
        first = whole.steps[0]
        assert first["health/update_skipped"] == 1 and not {"actor/loss", "actor/grad_norm"} & first.keys()
        found = ours(first, "spo_tree")
        assert found["kept_edge_frac"] == found["replay_size"] == 0 and found["root_value"] == 1
        assert len(rows(whole, 1)) == 1 and "step 1 is not trained on" in whole.output
        model = Path(OmegaConf.load(whole.out / "config.yaml").actor_rollout_ref.model.path)
        begun, first, second = load_file(model / "model.safetensors"), weights(whole, 1), weights(whole, 2)
        assert all(torch.equal(values, begun[name]) for name, values in first.items())
        assert any(not torch.equal(values, begun[name]) for name, values in second.items())

    def test_the_others_are(self, whole: Training) -> None:
        assert [step["step"] for step in whole.steps] == [1, 2, 3]
        for step in whole.steps[1:]:
            assert step["health/update_skipped"] == 0 and step["actor/grad_norm"] > 0.01
            assert len(rows(whole, step["step"])) == ROWS

    def test_responses_are_counted_and_not_their_rows(self, whole: Training) -> None:
        for step in whole.steps:
            found = ours(step, "spo_tree")
            assert 4 <= found["tree_leaves"] <= 24 and 1 <= found["tree_depth_mean"] <= 3
            assert step["health/groups_off_size"] == 0 and step["rollout/failed_sessions"] == 0
            assert step["health/generated_tokens"] == step["rollout/tokens"], "what siblings share is there once"
            assert step["rollout/responses"] > found["tree_leaves"] * PROMPTS
            shares = [step[f"health/{kind}_groups"] for kind in ("mixed", "all_right", "all_wrong")]
            assert sum(shares) == pytest.approx(1) and 0 < step["health/accuracy"] < 1
            assert step["health/length_wrong"] > 1.5 > step["response_length/mean"]

    def test_segments_stand_behind_what_comes_before_them(self, whole: Training) -> None:
        trained = rows(whole, 2)
        questions = {row["uid"].split("-")[0]: row["input"].partition("=")[0] for row in trained}
        assert len(set(questions.values())) == len(questions)
        for row in trained:
            assert row["input"].startswith(questions[row["uid"].split("-")[0]] + "=")
        deeper = [row for row in trained if not row["input"].endswith("=")]
        assert 0 < len(deeper) < len(trained)

    def test_rows_that_waited_come_back_with_their_own_log_probs(self, whole: Training) -> None:
        second, third = whole.steps[1:]
        assert ours(second, "spo_tree")["replay_size"] > 0 and ours(second, "spo_tree")["replay_age_max"] == 0
        assert {born(row) for row in rows(whole, 2)} == {2} and {born(row) for row in rows(whole, 3)} == {2, 3}
        old = sum(born(row) == 2 for row in rows(whole, 3)) / ROWS
        found = ours(third, "spo_tree")
        assert found["replay_age_mean"] == pytest.approx(old) and found["replay_age_max"] == 1
        assert third["training/off_policy/trajectory_staleness/mean"] == pytest.approx(old)
        # verl's pass with the current weights says something else of them than what they were stored with and have.
        assert second["training/rollout_probs_diff_max"] < 1e-3 < third["training/rollout_probs_diff_max"]
        assert third["health/effective_sample_size"] == pytest.approx(1, abs=1e-6)
        # One update a step: the ratio of fresh rows is 1, that of the others is against the policy that wrote them.
        assert abs(second["actor/ppo_kl"]) < 1e-7 < abs(third["actor/ppo_kl"])
        assert found["clip_frac_age_0"] == 0 and "clip_frac_age_1" in found

    def test_a_question_has_no_more_rows_than_it_may(self, whole: Training) -> None:
        """Repeated rows are the same row."""
        for step in (2, 3):
            of_prompt: dict[str, set] = {}
            for row in rows(whole, step):
                of_prompt.setdefault(row["uid"].split("-")[0], set()).add((born(row), row["input"], row["output"]))
            assert max(map(len, of_prompt.values())) <= 4

    def test_only_unsure_tokens_are_trained_on(self, whole: Training) -> None:
        for step in whole.steps[1:]:
            assert ours(step, "spo_tree")["masked_token_frac"] == pytest.approx(
                1 - ours(step, "prob_mask")["masked_out"]
            )
            assert math.isfinite(step["plugins/loss_terms/spo_kl"])


def weights(training: Training, step: int) -> dict[str, torch.Tensor]:
    """Parameters of a checkpoint (verl's own file, of our own run)."""
    import torch.distributed.tensor  # noqa: F401  its DTensors: `weights_only` loads no class that was not imported

    found = torch.load(training.out / f"global_step_{step}/actor/model_world_size_1_rank_0.pt", weights_only=True)
    return {name: value.to_local() if hasattr(value, "to_local") else value for name, value in found.items()}


@pytest.mark.long
class TestResumed:
    def test_a_restart_changes_nothing(self, whole: Training, resumed: Training) -> None:
        told = ("uid", "input", "output", "score")
        one, other = ([[row[name] for name in told] for row in rows(run, 3)] for run in (whole, resumed))
        assert one == other
        for key in ("actor/grad_norm", "actor/loss", "plugins/spo_tree/ratio_mean", "plugins/spo_tree/replay_size"):
            assert resumed.steps[-1][key] == pytest.approx(whole.steps[2][key], rel=1e-6), key
        assert max(float((a - weights(resumed, 3)[name]).abs().max()) for name, a in weights(whole, 3).items()) <= 1e-6

    def test_the_rows_that_wait_are_the_same_bit_for_bit(self, whole: Training, resumed: Training) -> None:
        one, other = (run.out / "global_step_3/plugins" for run in (whole, resumed))
        assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())
        arrays, again = (load_file(folder / "arrays.safetensors") for folder in (one, other))
        assert arrays.keys() == again.keys() and len(arrays["driver/spo_tree/row"]) > 0
        assert [name for name in arrays if not torch.equal(arrays[name], again[name])] == []


@pytest.mark.long
class TestColocateAsync:
    """With vade, which chooses the prompts, on two ranks, while rollouts go on; as many rows as there are."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        return train(
            "vade+spo_tree",
            out / "vade_spo_tree",
            *SHORT,
            *TREES,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=3",
            "plugins.spo_tree.rows=null",
        )

    def test_trains(self, both: Training) -> None:
        healthy(both, 3, on_policy=False, equal_groups=False)
        for step in both.steps:
            found = ours(step, "spo_tree")
            assert 0 < found["kept_edge_frac"] <= 1 and found["tree_leaves"] >= 3 and 0 < found["root_value"] < 1
            assert ours(step, "vade")["seen_fraction"] > 0 and step["health/groups_off_size"] == 0
        assert ours(both.steps[0], "spo_tree")["replay_size"] > 0
        assert ours(both.steps[-1], "spo_tree")["replay_age_max"] >= 1
