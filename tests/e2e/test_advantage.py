"""Recipes that change the advantage train through verl's real trainer, and their metrics look like what they do."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from training import PROMPTS, SHORT, Training, healthy, ours, train

from verl_plugins.cpu.demo import answers, draw, read_metrics, summary, validation_accuracy

pytestmark = pytest.mark.e2e


class TestGrpo:
    """Recipe grpo, mode sync, two mini-batches a step, validated before and after."""

    @pytest.fixture(scope="class")
    def grpo(self, out: Path) -> Training:
        batches = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
        validation = ("data.val_max_samples=32", "trainer.test_freq=2")
        validation += (f"trainer.validation_data_dir={out / 'grpo_answers'}",)
        return train("grpo", out / "grpo", "trainer.total_training_steps=2", batches, *validation)

    def test_trains(self, grpo: Training) -> None:
        healthy(grpo, 2)
        for step in grpo.steps:
            assert ours(step, "grpo")["group_size_min"] == 8
            equal = 1 - step["health/mixed_groups"]
            assert ours(step, "grpo")["zero_advantage_rows"] == pytest.approx(equal, abs=1e-6)

    def test_the_account_is_what_is_trained_on(self, grpo: Training) -> None:
        for step in grpo.steps:
            assert (step["rollout/responses"], step["rollout/responses_per_prompt"]) == (PROMPTS * 8, 8)
            assert step["rollout/tokens"] == pytest.approx(step["response_length/mean"] * PROMPTS * 8)
            assert step["rollout/tokens"] / PROMPTS == step["rollout/tokens_per_prompt"]
            assert step["rollout/tokens_per_prompt"] <= step["rollout/tokens_per_prompt_max"] <= 8 * 16

    def test_is_validated_with_the_default_scorer(self, grpo: Training) -> None:
        assert [step for step, _ in grpo.validations] == [0, 2]
        for _, metrics in grpo.validations:
            assert 0.1 < validation_accuracy(metrics) < 0.9
        assert "validation after step 2" in grpo.output

    def test_the_demo_summarises_and_draws_it(self, grpo: Training, tmp_path: Path) -> None:
        steps, validations = read_metrics(grpo.out / "metrics.jsonl")
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(summary(steps, validations, "cpu"))
        console.print(answers(*(grpo.out.with_name("grpo_answers") / f"{step}.jsonl" for step in (0, 2))))
        lines = [line for line in console.export_text().splitlines() if re.search(r"│ \d\+\d\+\d= *│ \d", line)]
        assert len(lines) == 3 == len(set(lines))
        picture = draw(steps, validations, tmp_path / "curves.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000

    def test_the_run_folder_says_what_ran(self, grpo: Training) -> None:
        text = (grpo.out / "config.yaml").read_text()
        assert "ppo_mini_batch_size: 8" in text
        assert '"verl": "0.9' in (grpo.out / "versions.json").read_text()


class TestBnpo:
    """Recipes vade and bnpo combined, mode sync: chosen prompts, two parts of the reward normalised each alone."""

    def test_trains(self, out: Path) -> None:
        parts = "plugins.bnpo.components=[acc,verifier_timeout]"
        both = train("vade+bnpo", out / "vade_bnpo", *SHORT, parts, "trainer.total_training_steps=2")
        healthy(both, 2)
        for step in both.steps:
            found = ours(step, "bnpo")
            assert found["p_mean/acc"] == pytest.approx(step["health/accuracy"], abs=1e-6)
            assert found["frac_p1/acc"] == pytest.approx(step["health/all_right_groups"], abs=1e-6)
            assert found["alpha/acc"] >= 1 and found["beta/acc"] >= 1
            assert (found["fallback/acc"], found["fallback/verifier_timeout"]) == (0, 1)
            assert 0 < found["advantage_var"] < 0.25
            assert ours(step, "vade")["effective_ratio"] == pytest.approx(step["health/mixed_groups"])


@pytest.mark.long
class TestAGrae:
    """Recipe a_grae, mode sync."""

    def test_trains(self, out: Path) -> None:
        training = train("a_grae", out / "a_grae", *SHORT, "trainer.total_training_steps=2")
        healthy(training, 2)
        for step in training.steps:
            found = ours(step, "a_grae")
            assert found["omega"] == found["pos_scale"] == pytest.approx(step["health/accuracy"], abs=1e-6)
            assert found["positive_share"] == pytest.approx(found["omega"] / (1 + found["omega"]), abs=1e-4)
            assert found["frac_solved_none"] == pytest.approx(step["health/all_wrong_groups"], abs=1e-6)


class TestMcGrpoAndAdora:
    """Recipes adora and mc_grpo combined, mode sync: adora reads lengths of responses that mc_grpo drops, too.

    Three responses a prompt, the median one not trained on, KL to a reference in the loss.
    """

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        return train("adora+mc_grpo", out / "adora_mc_grpo", *SHORT, "trainer.total_training_steps=2")

    def test_trains(self, both: Training) -> None:
        healthy(both, 2)
        for step in both.steps:
            found = ours(step, "mc_grpo")
            assert (found["group_size_min"], found["pivots_dropped"]) == (3, PROMPTS)
            assert 0 <= found["frac_mad_zero"] <= 1

    def test_advantages_are_weighed_by_lengths(self, both: Training) -> None:
        for step in both.steps:
            found = ours(step, "adora")
            assert found["frac_tas"] + found["frac_tds"] == pytest.approx(1)
            assert found["frac_no_success"] == pytest.approx(step["health/all_wrong_groups"], abs=1e-6)
            assert found["weight_mean"] == pytest.approx(found["frac_tas"] + 0.1 * found["frac_tds"], abs=1e-5)
            assert step["critic/advantages/max"] <= ours(step, "mc_grpo")["abs_adv_max"] == pytest.approx(1000)
            assert {abs(round(step[f"critic/advantages/{end}"])) for end in ("min", "max")} <= {0, 100, 1000}

    def test_the_reference_is_the_start(self, both: Training) -> None:
        first, second = (step["actor/kl_loss"] for step in both.steps)
        assert abs(first) < 1e-5
        assert second > 1e-7


class TestRiskpo:
    """Recipes riskpo and clip_cov combined, mode sync: quantiles tracked over steps and saved."""

    def test_trains(self, out: Path) -> None:
        both = train(
            "riskpo+clip_cov",
            out / "riskpo_clip_cov",
            *SHORT,
            "trainer.total_training_steps=2",
            "trainer.save_freq=2",
            "plugins.riskpo.bundle_size=4",
            "plugins.clip_cov.clip_cov_ratio=0.05",
        )
        healthy(both, 2)
        first, second = (ours(step, "riskpo") for step in both.steps)
        assert first["papers"] == second["papers"] == PROMPTS / 4 * 8
        assert second["q_alpha"] == pytest.approx(first["quantile_0.20"])
        assert second["q_beta"] == pytest.approx(first["quantile_0.80"])
        moved = [abs(second[name] - first[name]) for name in first if name.startswith("quantile_")]
        assert len(moved) == 19 and 0 < max(moved) <= 0.1
        saved = load_file(both.out / "global_step_2/plugins/arrays.safetensors")["driver/riskpo/tracked"]
        assert saved[9].item() == pytest.approx(second["quantile_0.50"])
        assert all(ours(step, "clip_cov")["num_selected"] > 0 for step in both.steps)


@pytest.mark.long
class TestProGrpo:
    """Recipe progrpo: confidence on prompt and response shifts the advantages of grpo."""

    def test_trains(self, out: Path) -> None:
        training = train("progrpo", out / "progrpo", *SHORT, "trainer.total_training_steps=2")
        healthy(training, 2)
        for step in training.steps:
            found = ours(step, "progrpo")
            assert found["active_groups"] == pytest.approx(1 - step["health/all_wrong_groups"])
            assert step["health/zero_advantage_rows"] == pytest.approx(step["health/all_wrong_groups"])
            assert ours(step, "grpo")["zero_advantage_rows"] > step["health/zero_advantage_rows"]
            assert 0 < found["prompt_confidence"] < found["answer_confidence_wrong"]
            assert found["answer_confidence_wrong"] < found["answer_confidence_correct"] < 1
            assert 0 < found["shift_abs_mean"] < found["shift_abs_max"] < 0.3


@pytest.mark.long
class TestCopo:
    """Recipe copo with two losses and two updates a step, progrpo around its advantages."""

    def test_trains(self, out: Path) -> None:
        training = train(
            "copo",
            out / "copo",
            *SHORT,
            "trainer.total_training_steps=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "plugins.copo.form=two_losses",
            "+plugins.progrpo.alpha=0.1",
        )
        healthy(training, 2)
        for step in training.steps:
            found = ours(step, "copo")
            assert found["groups_with_signal"] > step["health/mixed_groups"]
            assert found["return_mean"] == pytest.approx(step["health/accuracy"], abs=1e-6)
            assert 0 < found["answer_entropy_mean"] < found["answer_entropy_max"] <= 3
            assert found["local_weight_min"] < 1e-6 < 0.9 < found["local_weight_max"] < 1
            assert found["no_answer"] < 0.05
            assert math.isfinite(found["local_loss"] + found["global_loss"])
            assert ours(step, "progrpo")["shift_abs_max"] < 0.1


@pytest.mark.long
class TestDrpo:
    """Recipe drpo, two updates a step: the second has a policy that has moved."""

    def test_trains(self, out: Path) -> None:
        two_updates = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
        training = train("drpo", out / "drpo", *SHORT, two_updates, "trainer.total_training_steps=2")
        healthy(training, 2)
        for step in training.steps:
            found = ours(step, "drpo")
            assert step["health/zero_advantage_rows"] == pytest.approx(1 - step["health/mixed_groups"])
            assert step["health/sign_flips"] == 0
            assert 1 <= found["effective_positives"] <= 7
            assert 0 < found["negative_weight_max"] <= 1
            assert 1e-6 < abs(found["ppo_kl"]) < 0.1
            assert found["constraint_active"] in (0, 0.5, 1)
            assert step["health/length_right"] > 1
