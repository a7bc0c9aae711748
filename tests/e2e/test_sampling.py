"""Recipes that choose or change prompts, or the reward, train through verl's real trainer, most in colocate_async."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from training import PROMPTS, ROWS_OF_DATASET, SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e


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


@pytest.mark.long
class TestPortfolioMixture:
    """Recipe portfolio_mixture, mode colocate_async: the four levels of the task as sources."""

    def test_trains(self, out: Path) -> None:
        folder = out / "portfolio_mixture"
        training = train(
            "portfolio_mixture",
            folder,
            *SHORT,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.total_training_steps=3",
            "trainer.save_freq=3",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "plugins.portfolio_mixture.column=level",
            "plugins.portfolio_mixture.scale=4",
        )
        healthy(training, 3, on_policy=False)
        wealth = np.zeros(4)
        for step in training.steps:
            found = ours(step, "portfolio_mixture")
            weights = [found[f"weight_{level}"] for level in range(4)]
            assert sum(weights) == pytest.approx(1)
            assert min(weights) >= 0.02
            assert sum(found[f"prompts_{level}"] for level in range(4)) == PROMPTS
            seen = [level for level in range(4) if f"utility_{level}" in found]
            utility = np.array([found[f"utility_{level}"] for level in seen])
            assert utility.min() >= 0 and utility.max() < 1.1 and utility.std() > 0
            wealth[seen] += 4 * (utility - utility.mean())
            assert [found[f"log_wealth_{level}"] for level in range(4)] == pytest.approx(wealth)
        assert ours(training.steps[0], "portfolio_mixture")["weight_0"] == pytest.approx(0.25)
        prompts = [prompt_id for prompt_id, _, _ in training.draws()]
        assert len(prompts) == len(set(prompts)) == 3 * PROMPTS
        arrays = load_file(folder / "global_step_3/plugins/arrays.safetensors")
        assert arrays["driver/portfolio_mixture/log_wealth"].tolist() == pytest.approx(wealth.tolist())
        assert int(arrays["driver/portfolio_mixture/asked"].sum()) >= 3 * PROMPTS


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
    """Recipes prompt_augmentation and mc_grpo combined, mode colocate_async: short formats, one of them to validate."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        folder = out / "prompt_augmentation"
        return train(
            "prompt_augmentation+mc_grpo",
            folder,
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
            assert sum(value for key, value in found.items() if key.startswith("count/")) == 3 * PROMPTS
            assert 1 / 3 < found["format_mean"] < 1
            assert ours(step, "mc_grpo")["abs_adv_max"] > 0
            assert step["actor/kl_loss"] >= 0, "mc_grpo brings its KL term"

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


@pytest.mark.long
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


@pytest.mark.long
class TestEvolRl:
    """Recipes evol_rl and clip_cov combined on two ranks, mode colocate_async: twelve votes, four trained on."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        folder = out / "evol_rl_clip_cov"
        return train(
            "evol_rl+clip_cov",
            folder,
            *SHORT,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=2",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.rollout.temperature=1.4",
            "plugins.ttrl.n_votes=12",
            "plugins.evol_rl.valid=answer_extracted",
            "actor_rollout_ref.actor.clip_ratio_low=1.0",
            "actor_rollout_ref.actor.clip_ratio_high=1.0",
            "actor_rollout_ref.actor.entropy_coeff=0.003",
            "plugins.clip_cov.clip_cov_ratio=0.05",
        )

    def test_trains(self, both: Training) -> None:
        healthy(both, 2, on_policy=False)
        for step in both.steps:
            found = ours(step, "evol_rl")
            assert found["majority_ratio"] == pytest.approx(ours(step, "ttrl")["mean_reward"], abs=1e-6)
            assert 0.5 < found["valid_share"] <= 1 and 0 < found["similarity_mean"] < 1
            assert ours(step, "clip_cov")["num_selected"] > 0

    def test_the_side_gives_the_sign_and_novelty_the_size(self, both: Training) -> None:
        scores = []
        for file in (both.out / "rollouts").glob("*.jsonl"):
            scores += [row["score"] for row in map(json.loads, file.read_text().splitlines())]
        assert all(0.5 <= score <= 1 or -1 <= score <= -0.5 for score in scores)
        assert len({round(score, 4) for score in scores}) > 6


class TestSpoChain:
    """Recipes vade and spo_chain combined on two ranks, mode colocate_async: prefixes are continued and thrown away."""

    @pytest.fixture(scope="class")
    def both(self, out: Path) -> Training:
        folder = out / "vade_spo_chain"
        return train(
            "vade+spo_chain",
            folder,
            *SHORT,
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=2",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "actor_rollout_ref.rollout.n=4",
            "plugins.spo_chain.interval=1",
            "plugins.spo_chain.samples=3",
        )

    def test_trains(self, both: Training) -> None:
        healthy(both, 2, on_policy=False)
        for step in both.steps:
            found = ours(step, "spo_chain")
            assert 0 < found["adv_nonzero_frac"] < 1 and found["segment_advantage_abs"] > 0
            assert 0 < found["mc_value_mean"] < 1 and 0 < found["mc_unique_frac"] < 1
            assert step["health/groups_off_size"] == 0

    def test_what_is_thrown_away_is_counted(self, both: Training) -> None:
        for step in both.steps:
            kept = step["response_length/mean"] * 4 * PROMPTS
            extra = ours(step, "spo_chain")["extra_tokens_per_response"] * 4 * PROMPTS
            assert extra > 0 and step["rollout/tokens"] == pytest.approx(kept + extra, abs=1)

    def test_sure_tokens_are_not_trained_on(self, both: Training) -> None:
        for step in both.steps:
            assert 0.1 < ours(step, "prob_mask")["masked_out"] < 0.9


NOISY = '''
"""A judge: the verifier's score plus noise, another each time."""
import numpy as np
from verl_plugins import Plugin, hookimpl
from verl_plugins.services import Verdict

class Judge(Plugin):
    name = "judge"

    def __init__(self, config):
        super().__init__(config)
        self.rng = np.random.default_rng(0)

    @hookimpl(wrapper=True)
    def score_answer(self, answer):
        verdict = yield
        return Verdict(verdict.score + self.rng.normal(0, 0.3), verdict.correct, verdict.parts)
'''


@pytest.mark.long
class TestActionGrouping:
    """Recipe action_grouping, mode sync, on the scores of a judge with noise of 0.3."""

    @pytest.fixture(scope="class")
    def judged(self, out: Path) -> Training:
        site = out / "judge"
        information = site / "judge-1.0.dist-info"
        information.mkdir(parents=True)
        (site / "judge.py").write_text(NOISY)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: judge\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("[verl_plugins]\njudge = judge:Judge\n")
        folder = out / "action_grouping"
        return train(
            "action_grouping",
            folder,
            *SHORT,
            "trainer.total_training_steps=3",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            "plugins.action_grouping.sigma=0.3",
            "+plugins.judge={}",
            site=site,
        )

    def test_trains(self, judged: Training) -> None:
        healthy(judged, 3)
        for step in judged.steps:
            found = ours(step, "action_grouping")
            assert found["sigma"] == 0.3
            assert 0.2 < found["alpha_mean"] < 0.9
            assert 1 < found["n_groups_mean"] < 8
            assert 0.05 < found["score_var_removed"] < 0.9
            assert found["equal_classes"] == 0
        assert "nothing to pool" not in judged.log

    def test_scores_of_one_answer_are_drawn_together(self, judged: Training) -> None:
        """Classes of two whose variance is below that of the noise, 68 % of them, get their mean."""
        classes: dict[tuple[str, str], list[float]] = {}
        for file in (judged.out / "rollouts").glob("*.jsonl"):
            for row in map(json.loads, file.read_text().splitlines()):
                classes.setdefault((row["uid"].rsplit("_", 2)[0], row["output"]), []).append(row["score"])
        spreads = [statistics.pvariance(scores) for scores in classes.values() if len(scores) > 1]
        assert len(spreads) >= PROMPTS
        assert 0.4 < sum(spread < 1e-10 for spread in spreads) / len(spreads) < 1
