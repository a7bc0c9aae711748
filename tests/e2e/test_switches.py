"""Settings of verl's own that many runs switch on, several in one training: they do what they say under our trainer.

Which of them a training has is said in docs/capabilities.yaml, of which the guide's table is made.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from training import SHORT, Training, healthy, train

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
CAPABILITIES = yaml.safe_load((HERE.parents[1] / "docs" / "capabilities.yaml").read_text())
STEPS = 2
REWARD = """
def seven(data_source, solution_str, ground_truth, extra_info=None):
    right = solution_str.strip() == str(ground_truth)
    return {"score": 7.0 * right, "acc": float(right), "digits": float(sum(map(str.isdigit, solution_str)))}
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
