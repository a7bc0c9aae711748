"""Settings of verl's own that many runs switch on, several in one training: they do what they say under our trainer.

Which of them a training has is said in docs/capabilities.yaml, of which the guide's table is made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor  # the checkpoints' DTensors: `weights_only` loads no class that was not imported
import yaml
from one_tool import ASKED, REPLY
from training import SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
CAPABILITIES = yaml.safe_load((HERE.parents[1] / "docs" / "capabilities.yaml").read_text())
STEPS = 2
REWARD = """
def seven(data_source, solution_str, ground_truth, extra_info=None):
    right = solution_str.strip() == str(ground_truth)
    return {"score": 7.0 * right, "acc": float(right), "digits": float(sum(map(str.isdigit, solution_str)))}
"""


TOOL = """
tools:
  - class_name: one_tool.Again
    config: {type: native}
    tool_schema:
      type: function
      function:
        name: again
        description: Asks for another answer
        parameters: {type: object, properties: {}, required: []}
"""


def switches(test: str) -> list[str]:
    """What the list says that this class switches on."""
    named = [entry for entry in CAPABILITIES if entry.get("test", "").endswith(f"{HERE.name}/test_switches.py::{test}")]
    assert named
    return [override for entry in named for override in entry["overrides"]]


class TestReferenceCorrectionAndFilter:
    """KL to a reference in loss and reward, importance correction, filtered groups, a reward function of one's own."""

    @pytest.fixture(scope="class")
    def trained(self, out: Path) -> Training:
        function = out / "seven.py"
        function.write_text(REWARD)
        return train(
            "grpo",
            out / "reference",
            *SHORT,
            f"trainer.total_training_steps={STEPS}",
            *switches("TestReferenceCorrectionAndFilter"),
            f"reward.custom_reward_function.path={function}",
        )

    def test_the_function_scores(self, trained: Training) -> None:
        healthy(trained, STEPS)
        for step in trained.steps:
            assert step["reward/digits"] > 0
            assert step["health/reward"] == pytest.approx(7 * step["health/accuracy"], abs=0.05)

    def test_only_mixed_groups_are_left(self, trained: Training) -> None:
        assert [step["health/mixed_groups"] for step in trained.steps] == [1, 1]
        assert all(step["training/filter_groups/evicted_samples"] > 0 for step in trained.steps)

    def test_the_policy_leaves_its_reference(self, trained: Training) -> None:
        first, second = trained.steps
        assert 0 < first["actor/kl_loss"] < second["actor/kl_loss"]
        start, left = (abs(step["actor/reward_kl_penalty"]) for step in trained.steps)  # an estimate, of either sign
        assert start < 1e-4 < left

    def test_the_weights_of_the_correction_are_near_one_on_policy(self, trained: Training) -> None:
        for step in trained.steps:
            assert step["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-3)


class TestCriticAdaptersPackingBypassAndTools:
    """GAE with a critic, LoRA, packed sequences, fixed micro-batches, bypass mode, a tool in a second turn."""

    @pytest.fixture(scope="class")
    def trained(self, out: Path) -> Training:
        tools, agent = out / "tools.yaml", "actor_rollout_ref.rollout.multi_turn"
        tools.write_text(TOOL)
        return train(
            "grpo",
            out / "critic",
            *SHORT,
            f"trainer.total_training_steps={STEPS}",
            *switches("TestCriticAdaptersPackingBypassAndTools"),
            f"{agent}.tool_config_path={tools}",
            f"{agent}.format=begins_with_one",
            f"{agent}.max_assistant_turns=2",
            "trainer.save_freq=2",
            f"trainer.rollout_data_dir={out / 'critic_rollouts'}",
            site=HERE,
        )

    def rows(self, trained: Training, step: int) -> list[dict]:
        text = (trained.out.parent / f"critic_rollouts/{step}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def test_answers_that_ask_for_the_tool_have_its_reply_and_go_on(self, trained: Training) -> None:
        for step in (1, 2):
            answers = [row["output"] for row in self.rows(trained, step)]
            asked = [answer for answer in answers if answer.startswith(ASKED)]
            assert 0.1 < len(asked) / len(answers) < 0.9
            assert all((REPLY in answer) == answer.startswith(ASKED) for answer in answers if len(answer) < 8)
            assert trained.steps[step - 1]["num_turns/max"] == 4 > trained.steps[step - 1]["num_turns/mean"] > 2

    def test_the_ratio_is_that_to_the_rollout(self, trained: Training) -> None:
        for step in trained.steps:
            assert "actor/entropy" not in step, "no forward pass before the update"
            assert abs(step["actor/ppo_kl"]) < 0.01, "LoRA's weights are sent as bfloat16"
            assert step["actor/grad_norm"] > 0

    def test_the_critic_learns_and_gives_advantages_within_a_response(self, trained: Training) -> None:
        first, second = trained.steps
        assert first["critic/vf_loss"] > 0 and first["critic/values/mean"] != second["critic/values/mean"]
        assert second["critic/grad_norm"] > 0

    def test_adapters_are_all_that_was_trained(self, trained: Training) -> None:
        weights = torch.load(trained.out / "global_step_2/actor/model_world_size_1_rank_0.pt", weights_only=True)
        assert any("lora_A" in name for name in weights)


class TestLookup:
    """Recipes igpo and epo on the preset lookup: digits that only the tool knows."""

    @pytest.fixture(scope="class")
    def trained(self, out: Path) -> Training:
        chosen = ("~plugins.word_f1", "plugins.igpo.sentence=''", "actor_rollout_ref.actor.loss_agg_mode=token-mean")
        chosen += ("actor_rollout_ref.actor.kl_loss_coef=0.001", f"trainer.rollout_data_dir={out / 'lookup_rollouts'}")
        steps = f"trainer.total_training_steps={STEPS}"
        return train("igpo+epo", out / "lookup", *SHORT, steps, *chosen, preset="lookup")

    def test_who_asks_is_told_and_who_is_right_has_asked(self, trained: Training) -> None:
        healthy(trained, STEPS)
        for step in trained.steps:
            text = (trained.out.parent / f"lookup_rollouts/{step['step']}.jsonl").read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            hidden = {row["uid"]: sum(map(row["input"].count, "abcdefghij")) for row in rows}
            told = [len(re.findall(r"\?[a-j]\n\d\n", row["output"])) for row in rows]
            assert ours(step, "igpo")["turns"] == pytest.approx(1 + sum(told) / len(told))
            asked = [row["score"] for row, times in zip(rows, told, strict=True) if 0 < hidden[row["uid"]] == times]
            guessed = [row["score"] for row, times in zip(rows, told, strict=True) if hidden[row["uid"]] > times]
            assert sum(asked) / len(asked) > 0.6 > 0.3 > sum(guessed) / len(guessed)

    def test_each_turn_has_an_entropy_and_a_gain(self, trained: Training) -> None:
        for step in trained.steps:
            assert {"entropy/turn_0", "entropy/turn_1", "entropy/turn_2"} <= ours(step, "epo").keys()
            found = ours(step, "igpo")
            assert found["fallback_frac"] == 0 and found["info_gain_min"] < 0 < found["info_gain_max"]


class TestTurnsWithATool:
    """Recipe igpo: answers that begin with a one are asked for again, and the turn before is paid for it."""

    @pytest.fixture(scope="class")
    def trained(self, out: Path) -> Training:
        tools, agent = out / "igpo_tools.yaml", "actor_rollout_ref.rollout.multi_turn"
        tools.write_text(TOOL)
        return train(
            "igpo",
            out / "igpo",
            *SHORT,
            f"trainer.total_training_steps={STEPS}",
            "~plugins.word_f1",
            "plugins.igpo.sentence=' so: '",
            f"{agent}.enable=true",
            "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
            f"{agent}.tool_config_path={tools}",
            f"{agent}.format=begins_with_one",
            f"{agent}.max_assistant_turns=2",
            f"trainer.rollout_data_dir={out / 'igpo_rollouts'}",
            site=HERE,
        )

    def test_turns_are_told_apart_and_paid(self, trained: Training) -> None:
        healthy(trained, STEPS)
        for step in trained.steps:
            found = {key.removeprefix("plugins/igpo/"): value for key, value in step.items() if "/igpo/" in key}
            text = (trained.out.parent / f"igpo_rollouts/{step['step']}.jsonl").read_text()
            several = [REPLY in json.loads(line)["output"] for line in text.splitlines()]
            assert 0 < sum(several) < len(several)
            assert found["turns"] == pytest.approx(1 + sum(several) / len(several))
            assert found["fallback_frac"] == 0 and found["info_gain_min"] < found["info_gain_max"]
            assert found["outcome_mean"] == pytest.approx(step["health/reward"], abs=1e-6)
