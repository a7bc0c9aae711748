"""Every recipe trains through verl's real trainer, in both modes, and its metrics look like what it does."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file
from training import SHORT, Training, train

from verl_plugins.cpu.demo import draw, read_metrics, summary, validation_accuracy

pytestmark = pytest.mark.e2e

PROMPTS, ROWS_OF_DATASET = 16, 512
NAN_ON_PURPOSE = ("variance_proxy", "perf/mfu")


def ours(step: dict[str, float], plugin: str) -> dict[str, float]:
    """The step's metrics of one plugin."""
    prefix = f"plugins/{plugin}/"
    return {key.removeprefix(prefix): value for key, value in step.items() if key.startswith(prefix)}


def healthy(training: Training, steps: int, *, on_policy: bool = True) -> None:
    """All steps are there, all numbers are finite, the weights moved, and rollout and actor agree on log-probs."""
    assert [step["step"] for step in training.steps] == list(range(1, steps + 1))
    for step in training.steps:
        wrong = [k for k, v in step.items() if not (isinstance(v, (int, float)) and math.isfinite(v))]
        assert [key for key in wrong if not any(part in key for part in NAN_ON_PURPOSE)] == []
        assert step["actor/grad_norm"] > 0.01 or step["health/mixed_groups"] == 0
        assert 0 < step["actor/entropy"] < math.log(260)
        shares = [step[f"health/{kind}_groups"] for kind in ("mixed", "all_right", "all_wrong")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert shares[1] <= step["health/accuracy"] <= 1 - shares[2]
        assert step["rollout/tokens"] >= step["health/generated_tokens"] > 0
        if on_policy:
            assert step["training/rollout_probs_diff_max"] < 1e-3
    for line in (f"step    {number}/{steps}" for number in range(1, steps + 1)):
        assert line in training.output


class TestGrpo:
    """Recipe grpo, mode sync, two mini-batches a step, validated before and after."""

    @pytest.fixture(scope="class")
    def grpo(self, out: Path) -> Training:
        batches = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
        validation = ("data.val_max_samples=32", "trainer.test_freq=2")
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
        console = Console(width=120, record=True, quiet=True)
        console.print(summary(steps, validations))
        picture = draw(steps, validations, tmp_path / "curves.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000

    def test_the_run_folder_says_what_ran(self, grpo: Training) -> None:
        text = (grpo.out / "config.yaml").read_text()
        assert "ppo_mini_batch_size: 8" in text
        assert '"verl": "0.9' in (grpo.out / "versions.json").read_text()


class TestMcGrpo:
    """Recipe mc_grpo: three responses a prompt, the median one not trained on, KL to a reference in the loss."""

    @pytest.fixture(scope="class")
    def mc_grpo(self, out: Path) -> Training:
        return train("mc_grpo", out / "mc_grpo", *SHORT, "trainer.total_training_steps=2")

    def test_trains(self, mc_grpo: Training) -> None:
        healthy(mc_grpo, 2)
        for step in mc_grpo.steps:
            found = ours(step, "mc_grpo")
            assert (found["group_size_min"], found["pivots_dropped"]) == (3, PROMPTS)
            assert 0 <= found["frac_mad_zero"] <= 1
            assert found["abs_adv_max"] > 0

    def test_the_reference_is_the_start(self, mc_grpo: Training) -> None:
        first, second = (step["actor/kl_loss"] for step in mc_grpo.steps)
        assert abs(first) < 1e-5
        assert second > 1e-7


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


class TestAdora:
    """Recipes adora and mc_grpo combined, mode sync: the wrapper reads lengths of responses that are dropped, too."""

    def test_trains(self, out: Path) -> None:
        both = train("adora+mc_grpo", out / "adora_mc_grpo", *SHORT, "trainer.total_training_steps=2")
        healthy(both, 2)
        for step in both.steps:
            found = ours(step, "adora")
            assert found["frac_tas"] + found["frac_tds"] == pytest.approx(1)
            assert found["frac_no_success"] == pytest.approx(step["health/all_wrong_groups"], abs=1e-6)
            assert found["weight_mean"] == pytest.approx(found["frac_tas"] + 0.1 * found["frac_tds"], abs=1e-5)
            assert step["critic/advantages/max"] <= ours(step, "mc_grpo")["abs_adv_max"] == pytest.approx(1000)
            assert {abs(round(step[f"critic/advantages/{end}"])) for end in ("min", "max")} <= {0, 100, 1000}


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
    """Recipe epo, two updates a step, a narrow band and a large coefficient; one turn per response."""

    def test_trains(self, out: Path) -> None:
        training = train(
            "epo",
            out / "epo",
            *SHORT,
            "trainer.total_training_steps=2",
            "trainer.save_freq=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.actor.entropy_coeff=0.05",
            "plugins.epo.min_ratio=0.8",
            "plugins.epo.max_ratio=1.2",
        )
        healthy(training, 2)
        entropies = []
        for number, step in enumerate(training.steps):
            found = ours(step, "epo")
            entropies.append(found["entropy/turn_0"])
            assert found["entropy/turn_0"] == pytest.approx(step["actor/entropy"], abs=1e-4)
            assert found["history/turn_0"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-6)
            assert found["rows_at_gate"] == found["gate_open_share"] == 1
            assert 0 < found["within_band_fraction"] < 0.6
            assert found["phase_weight"] == pytest.approx(1 - 0.2 * (1 - math.exp(-2 * number / 75)))
            assert step["plugins/loss_terms/epo_smooth"] == pytest.approx(0.05 * found["penalty"], rel=0.2)
        saved = load_file(training.out / "global_step_2/plugins/arrays.safetensors")
        assert saved["driver/epo/total"].tolist() == [pytest.approx(sum(entropies))]

    def test_sees_the_turns_of_an_agent(self, out: Path) -> None:
        """Every second response has two turns, with masked tokens between them."""
        loops = out / "agent_loops.yaml"
        loops.write_text("- name: two_turns\n  _target_: two_turns.TwoTurns\n")
        training = train(
            "epo",
            out / "epo_two_turns",
            *SHORT,
            "trainer.total_training_steps=2",
            "trainer.save_freq=2",
            "actor_rollout_ref.actor.entropy_coeff=0.05",
            f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
            "actor_rollout_ref.rollout.agent.default_agent_loop=two_turns",
            "plugins.epo.gate_turn=1",
            "plugins.epo.gate_scope=row",
            "plugins.epo.max_ratio=0.5",
            site=Path(__file__).parent,
        )
        healthy(training, 2)
        found = [ours(step, "epo") for step in training.steps]
        for number in (0, 1):
            means = [step[f"entropy/turn_{number}"] for step in found]
            assert min(means) > 0
            assert found[1][f"history/turn_{number}"] == pytest.approx(sum(means) / 2, abs=1e-6)
        assert found[0]["entropy/turn_0"] != pytest.approx(found[0]["entropy/turn_1"], abs=1e-3)
        for step in found:
            assert "entropy/turn_2" not in step
            assert step["rows_at_gate"] == 0.5
            assert step["gate_open_share"] == pytest.approx(0.5, abs=0.2)
            assert step["penalty"] > 0
        saved = load_file(training.out / "global_step_2/plugins/arrays.safetensors")
        assert saved["driver/epo/reached"].tolist() == [2, 2]


class TestVade:
    """Recipe vade, mode sync: prompts are chosen by a belief that the rollouts of every step update."""

    def test_trains(self, vade: Training) -> None:
        healthy(vade, 4)
        for number, step in enumerate(vade.steps, 1):
            found = ours(step, "vade")
            assert found["effective_ratio"] == pytest.approx(step["health/mixed_groups"])
            assert found["solve_none"] == pytest.approx(step["health/all_wrong_groups"])
            assert PROMPTS / ROWS_OF_DATASET <= found["seen_fraction"] <= number * PROMPTS / ROWS_OF_DATASET
            assert 0 < found["theta_selected_mean"] < 1

    def test_the_plugin_chooses_the_prompts(self, vade: Training) -> None:
        draws = vade.draws()
        assert [sum(trained == step for _, _, trained in draws) for step in (1, 2, 3, 4)] == [PROMPTS] * 4
        assert all(drawn == trained for _, drawn, trained in draws)
        assert len({prompt_id for prompt_id, _, _ in draws}) > 2 * PROMPTS


class TestMopps:
    """Recipe mopps, mode colocate_async, in pools four times the batch. Odd prompts are known to be hopeless."""

    def test_trains(self, out: Path) -> None:
        folder, known = out / "mopps", out / "known.json"
        known.write_text(json.dumps({str(n): [0 if n % 2 else 4, 8] for n in range(ROWS_OF_DATASET)}))
        training = train(
            "mopps",
            folder,
            *SHORT,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.total_training_steps=2",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "plugins.mopps.pool_ratio=4",
            f"plugins.mopps.init_from={known}",
        )
        healthy(training, 2, on_policy=False)
        for step in training.steps:
            found = ours(step, "mopps")
            assert found["effective_ratio"] == pytest.approx(step["health/mixed_groups"])
            assert found["passes"] == 1
            assert abs(found["theta_selected_mean"] - 0.5) < 0.2
            asked = step["step"] * PROMPTS * 8 / ROWS_OF_DATASET
            assert found["evidence_mass_mean"] == pytest.approx(8 * 3.0 + asked)
        prompts = [prompt_id for prompt_id, _, _ in training.draws()]
        assert len(prompts) == len(set(prompts)) == 2 * PROMPTS
        assert {prompt_id % 2 for prompt_id in prompts} == {0}


class TestColocateAsync:
    """Recipes vade and clip_cov combined, mode colocate_async: rollouts run ahead of the updates."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        folder = out / "both"
        return train(
            "vade+clip_cov",
            folder,
            *SHORT,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.total_training_steps=3",
            "trainer.save_freq=3",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "plugins.clip_cov.clip_cov_ratio=0.05",
        )

    def test_trains(self, both: Training) -> None:
        healthy(both, 3, on_policy=False)
        assert both.steps[0]["training/rollout_probs_diff_max"] < 1e-3
        assert max(step["training/off_policy/trajectory_staleness/max"] for step in both.steps) >= 1

    def test_clip_cov_takes_tokens_out_of_the_gradient(self, both: Training) -> None:
        for step in both.steps:
            found = ours(step, "clip_cov")
            assert 0 < found["num_selected"] <= found["num_candidates"]
            assert 0.02 < found["pg_clipfrac"] < 0.06
            assert found["cov_max"] > found["cov_mean"]

    def test_prompts_in_flight_are_not_drawn_again(self, both: Training) -> None:
        draws = both.draws()
        assert len(draws) == 3 * PROMPTS
        assert any(drawn < trained for _, drawn, trained in draws)
        for (one, _, trained), (other, drawn, _) in itertools.pairwise(draws):
            assert one != other or trained < drawn

    def test_the_queue_and_the_plugins_are_saved_together(self, both: Training) -> None:
        checkpoint = both.out / "global_step_3"
        assert (checkpoint / "transfer_queue").is_dir()
        arrays = load_file(checkpoint / "plugins/arrays.safetensors")
        assert any(name.startswith("driver/vade/") for name in arrays)


class TestTtrlAndKlCov:
    """Recipes ttrl and kl_cov combined, mode sync: twelve votes, four of them trained on, two updates a step."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        folder = out / "ttrl_kl_cov"
        return train(
            "ttrl+kl_cov",
            folder,
            *SHORT,
            "trainer.total_training_steps=2",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "plugins.ttrl.n_votes=12",
            "plugins.kl_cov.kl_cov_ratio=0.1",
        )

    def test_trains(self, both: Training) -> None:
        healthy(both, 2)
        for step in both.steps:
            assert ours(step, "grpo")["group_size_min"] == 4
            assert step["health/groups_off_size"] == 0
            found = ours(step, "ttrl")
            assert found["ground_truth_ratio"] == pytest.approx(step["health/accuracy"], abs=1e-6)
            assert 1 / 12 <= found["majority_ratio"] == pytest.approx(found["mean_reward"], abs=1e-6)
            assert 0 < found["label_accuracy"] < 1
            assert found["missing_answer_share"] < 0.05
            assert step["rollout/responses"] == 12 * PROMPTS
            assert step["rollout/tokens"] > 2 * step["response_length/mean"] * 4 * PROMPTS

    def test_agreement_is_rewarded(self, both: Training) -> None:
        for file in (both.out / "rollouts").glob("*.jsonl"):
            groups: dict[str, list[dict]] = {}
            for row in map(json.loads, file.read_text().splitlines()):
                groups.setdefault(row["uid"].rsplit("_", 2)[0], []).append(row)
            assert len(groups) == PROMPTS
            for rows in groups.values():
                agreeing = {row["output"] for row in rows if row["score"] == 1}
                assert len(agreeing) <= 1
                assert agreeing.isdisjoint(row["output"] for row in rows if row["score"] == 0)
            assert any(row["score"] == 1 and row["output"] != row["gts"] for rows in groups.values() for row in rows)

    def test_kl_cov_penalises_what_has_moved(self, both: Training) -> None:
        for step in both.steps:
            found = ours(step, "kl_cov")
            tokens = step["response_length/mean"] * 4 * PROMPTS / 2
            assert found["num_selected"] == pytest.approx(0.1 * tokens, abs=1)
            assert found["selected_cov"] > found["selected_cov_min"] > 0
            assert found["ratio_max"] > 1
            assert 0 < found["penalty"] < found["selected_abs_kl"]


class TestPromptAugmentation:
    """Recipe prompt_augmentation with mc_grpo, mode colocate_async, short formats, validated in one of them."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        folder = out / "prompt_augmentation"
        return train(
            "prompt_augmentation",
            folder,
            "+plugins.mc_grpo={}",
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=false",
            "trainer.test_freq=2",
            "data.val_max_samples=16",
            f"trainer.validation_data_dir={folder / 'validations'}",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            f"plugins.prompt_augmentation.templates=[{Path(__file__).parents[2] / 'benchmarks/short_templates.yaml'}]",
            "plugins.prompt_augmentation.validation=begun",
        )

    def test_trains(self, both: Training) -> None:
        healthy(both, 2, on_policy=False)
        for step in both.steps:
            found = ours(step, "prompt_augmentation")
            assert found["acc_mean"] == pytest.approx(step["health/accuracy"], abs=1e-6)
            assert found["format/plain"] == 1
            assert sum(value for key, value in found.items() if key.startswith("count/")) == 8 * PROMPTS
            assert 1 / 3 < found["format_mean"] < 1
            assert ours(step, "mc_grpo")["abs_adv_max"] > 0

    def test_a_group_shares_its_format_and_the_prefill_is_prompt(self, both: Training) -> None:
        for file in (both.out / "rollouts").glob("*.jsonl"):
            groups: dict[str, set[str]] = {}
            for row in map(json.loads, file.read_text().splitlines()):
                groups.setdefault(row["uid"].rsplit("_", 2)[0], set()).add(row["input"])
            inputs = [text for (text,) in groups.values()]
            formats = [text.startswith("s ") or 2 * text.endswith("==") for text in inputs]
            assert {0, 1, 2} == set(formats)

    def test_validation_has_one_format(self, both: Training) -> None:
        rows = (both.out / "validations" / "2.jsonl").read_text().splitlines()
        assert all(json.loads(row)["input"].endswith("==") for row in rows)
        assert len(rows) == 16 * 8


class TestSiri:
    """Recipes siri and vade combined, mode colocate_async: budgets of 1 and 16 tokens in turn, validated every step."""

    @pytest.fixture(scope="class")
    def siri(self, out: Path) -> Training:
        folder = out / "siri"
        return train(
            "siri+vade",
            folder,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.total_training_steps=3",
            "trainer.val_before_train=false",
            "trainer.test_freq=1",
            "data.val_max_samples=16",
            f"trainer.validation_data_dir={folder / 'validations'}",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "plugins.siri.scheduler=stair",
            "plugins.siri.cycle_length=2",
            "plugins.siri.min_length=1",
        )

    def test_the_budget_follows_its_schedule(self, siri: Training) -> None:
        healthy(siri, 3, on_policy=False)
        found = [ours(step, "siri") for step in siri.steps]
        assert [step["max_length"] for step in found] == [1, 16, 1]
        assert [step["phase"] for step in found] == [0, 1, 0]
        assert [step["cycle_index"] for step in found] == [0, 0, 1]

    def test_a_response_is_judged_by_the_budget_of_its_draw(self, siri: Training) -> None:
        for step in siri.steps:
            drawn = {drawn for _, drawn, trained in siri.draws() if trained == step["step"]}
            budgets = {1 if number % 2 else 16 for number in drawn}
            found = ours(step, "siri")
            assert (found["budget_min"], found["budget_max"]) == (min(budgets), max(budgets))
            assert step["response_length/max"] <= max(budgets)
            assert (found["truncated_frac"] > 0.3) == (1 in budgets)
            assert step["health/truncated"] == pytest.approx(found["truncated_frac"])

    def test_validation_is_not_capped(self, siri: Training) -> None:
        rows = (siri.out / "validations" / "1.jsonl").read_text().splitlines()
        texts = [json.loads(row)["output"] for row in rows]
        assert len(texts) == 16 * 8
        assert sum(len(text) > 1 for text in texts) > len(texts) / 2
        assert ours(siri.steps[0], "siri")["budget_max"] == 1
