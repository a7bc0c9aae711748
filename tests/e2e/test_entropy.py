"""Recipes that change the loss, or watch entropy or templates, train through verl's real trainer, as metrics say."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from training import PROMPTS, SHORT, Training, healthy, ours, train
from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.cpu.demo import validation_accuracy

pytestmark = pytest.mark.e2e


class TestSteerDcpoAndTheEntropyLaw:
    """Recipe steer with dcpo around its advantages, two updates a step in small micro-batches, validated throughout."""

    @pytest.fixture(scope="class")
    def steer(self, out: Path) -> Training:
        return train(
            "steer",
            out / "steer",
            "trainer.test_freq=1",
            "data.val_max_samples=16",
            "trainer.total_training_steps=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
            "plugins.steer.map=linear",
            "plugins.steer.scope=batch",
            "+plugins.dcpo.entropy_base=0.3",
            "+plugins.dcpo.entropy_source=previous_mc",
            "+plugins.entropy_law.min_points=2",
        )

    def test_steer_weighs_by_the_change_of_entropy(self, steer: Training) -> None:
        healthy(steer, 4)
        for step in steer.steps:
            found = ours(step, "steer")
            assert found["token_weight_min"] == pytest.approx(0.8, abs=0.1)
            assert found["token_weight_min"] < found["token_weight_mean"] < found["token_weight_max"]
            assert found["token_weight_max"] == pytest.approx(1.2)
            assert 0 < found["low_weight_share"] < 0.5
            assert found["abs_omega_mean"] < found["abs_omega_p99"] <= found["abs_omega_max"]
            assert 0 < found["positive_share"] < 1
            assert found["predicted_entropy_change"] != 0
        for before, step in itertools.pairwise(steer.steps):
            change = step["actor/entropy"] - before["actor/entropy"]
            assert ours(step, "steer")["entropy_change"] == pytest.approx(change)

    def test_dcpo_switches_the_temperature_by_the_entropy_of_the_last_update(self, steer: Training) -> None:
        found = [ours(step, "dcpo") for step in steer.steps]
        assert [step["temperature"] for step in found] == [1.2, 0.8, 0.8, 0.8]
        assert found[0]["entropy"] == 0
        measured = [step["previous_entropy"] for step in found[:-1]]
        assert [step["entropy"] for step in found[1:]] == pytest.approx(measured)
        for step, metrics in zip(found, steer.steps, strict=True):
            assert step["true_ratio"] == pytest.approx(metrics["health/accuracy"], abs=1e-6)
            assert step["alpha"] == pytest.approx(step["a0"] / (step["a0"] + step["true_ratio"]))
            assert step["forward_pass"] == 1
            assert step["rho_min"] < step["rho_mean"] < step["rho_max"] < 10
            assert 0 < step["reinforce_share"] < 0.7
        assert found[0]["rho_mean"] < 1 < found[1]["rho_mean"]

    def test_the_entropy_law_pairs_a_validation_with_the_next_steps_entropy(self, steer: Training) -> None:
        found = [ours(step, "entropy_law") for step in steer.steps]
        assert [step["n"] for step in found] == [1, 2, 3, 4]
        assert ["a" in step for step in found] == [False, True, True, True]
        assert [step for step, _ in steer.validations] == [0, 1, 2, 3, 4]
        scores = [validation_accuracy(metrics) for _, metrics in steer.validations]
        slope, intercept = np.polyfit(np.exp([step["entropy"] for step in found]), scores[:4], 1)
        assert found[3]["a"] == pytest.approx(-slope, abs=1e-6)
        assert found[3]["b"] == pytest.approx(intercept, abs=1e-6)
        assert (steer.out / "entropy_law.png").read_bytes().startswith(b"\x89PNG")


class TestEpo:
    """Recipe epo, two updates a step, a narrow band and a large coefficient; every second response has two turns."""

    def test_sees_the_turns_of_an_agent(self, out: Path) -> None:
        loops = out / "agent_loops.yaml"
        loops.write_text("- name: two_turns\n  _target_: two_turns.TwoTurns\n")
        training = train(
            "epo",
            out / "epo",
            *SHORT,
            "trainer.total_training_steps=2",
            "trainer.save_freq=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.actor.entropy_coeff=0.05",
            f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
            "actor_rollout_ref.rollout.agent.default_agent_loop=two_turns",
            "plugins.epo.gate_turn=1",
            "plugins.epo.gate_scope=row",
            "plugins.epo.min_ratio=0.8",
            "plugins.epo.max_ratio=1.2",
            site=Path(__file__).parent,
        )
        healthy(training, 2)
        found = [ours(step, "epo") for step in training.steps]
        saved = load_file(training.out / "global_step_2/plugins/arrays.safetensors")
        assert saved["driver/epo/reached"].tolist() == [2, 2]
        for turn in (0, 1):
            means = [step[f"entropy/turn_{turn}"] for step in found]
            assert min(means) > 0
            assert found[1][f"history/turn_{turn}"] == pytest.approx(sum(means) / 2, abs=1e-6)
            assert saved["driver/epo/total"][turn].item() == pytest.approx(sum(means))
        for number, (step, metrics) in enumerate(zip(found, training.steps, strict=True)):
            first, second = step["entropy/turn_0"], step["entropy/turn_1"]
            assert "entropy/turn_2" not in step
            assert first != pytest.approx(second, abs=1e-3)
            assert min(first, second) <= metrics["actor/entropy"] <= max(first, second)
            assert step["rows_at_gate"] == 0.5
            assert step["gate_open_share"] == pytest.approx(0.5, abs=0.2)
            assert 0 < step["within_band_fraction"] < 0.6
            assert step["phase_weight"] == pytest.approx(1 - 0.2 * (1 - math.exp(-2 * number / 75)))
            assert metrics["plugins/loss_terms/epo_smooth"] == pytest.approx(0.05 * step["penalty"], rel=0.2)


@pytest.mark.long
class TestBeMoreActive:
    """Recipe be_more_active beside prompt_augmentation, mode sync: as many prompts as a step has, each asked thrice."""

    def test_draws_of_a_prompt_are_compared(self, out: Path) -> None:
        folder = out / "be_more_active"
        folder.mkdir()
        sums = [(number % 7, number // 3, number % 5) for number in range(PROMPTS)]
        rows = [{"question": f"{a}+{b}+{c}=", "answer": f"#### {a + b + c}"} for a, b, c in sums]
        (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
        done = CliRunner().invoke(app, ["data", "convert", f"{folder}/sums.jsonl", "--to", f"{folder}/train.parquet"])
        assert done.exit_code == 0, done.output
        training = train(
            "prompt_augmentation+be_more_active",
            folder / "run",
            *SHORT,
            "trainer.total_training_steps=3",
            f"data.train_files={folder}/train.parquet",
            f"data.val_files={folder}/train.parquet",
            f"plugins.prompt_augmentation.templates=[{Path(__file__).parents[2] / 'benchmarks/short_templates.yaml'}]",
            "plugins.prompt_augmentation.validation=begun",
            "plugins.be_more_active.statistic=correct",
        )
        healthy(training, 3)
        first, *later = (ours(step, "be_more_active") for step in training.steps)
        assert first == {"responses": 8 * PROMPTS, "slot/format_name/n_prompts": 0}, "a draw has one template"
        for number, found in enumerate(later, 2):
            assert found["responses"] == 8 * PROMPTS * number
            assert 1 <= found["slot/format_name/n_prompts"] <= PROMPTS
            assert sum(found[f"slot/format_name/{kind}"] for kind in ("passive", "active", "mixed")) == 1
            assert 0 < found["slot/format_name/u_mean"] < 1
            assert 0 <= found["slot/format_name/u_var"] < 0.25
        assert later[0]["slot/format_name/n_prompts"] <= later[1]["slot/format_name/n_prompts"]


@pytest.mark.long
class TestNrrCore:
    """Recipes nrr_core and clip_cov combined, and steer around the policy loss, two updates a step."""

    def test_trains(self, out: Path) -> None:
        training = train(
            "nrr_core+clip_cov",
            out / "nrr_core",
            *SHORT,
            "trainer.total_training_steps=3",
            "trainer.save_freq=3",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.actor.optim.lr=3e-4",
            "plugins.nrr_core.initial_coeff=0.01",
            "+plugins.steer={}",
            "plugins.clip_cov.clip_cov_ratio=0.05",
        )
        healthy(training, 3)
        coefficient, before = 0.01, None
        for step in training.steps:
            found, entropy = ours(step, "nrr_core"), step["actor/entropy"]
            if before is not None:
                gap = before - 0.02 - entropy
                coefficient = min(max(coefficient + 0.05 * gap, 0), 0.02)
                assert found["violation"] == pytest.approx(max(gap, 0), abs=1e-4)
            assert found["entropy_coeff"] == pytest.approx(coefficient, abs=1e-5)
            assert found["reference"] == pytest.approx(entropy if before is None else before, abs=1e-4)
            if coefficient > 1e-4:
                # The bonus is minus c times the mean entropy while it trains, which is near that before.
                assert step["plugins/loss_terms/nrr_entropy"] == pytest.approx(-coefficient * entropy, rel=0.5)
            assert 0 < found["answer_bits_norm"] < 1
            assert found["answer_bits"] == pytest.approx(3 * found["answer_bits_norm"])
            before = entropy
