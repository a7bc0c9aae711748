"""Methods that sample, combined, go on from a checkpoint in another folder; mode sync."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resuming import Resuming
from safetensors.torch import load_file
from training import PROMPTS, Training, four_steps, train

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SAMPLING = "siri+mopps+prompt_augmentation"
SAMPLING_SETTINGS = (
    "plugins.siri.cycle_length=6",
    "plugins.siri.min_length=4",
    "plugins.mopps.pool_ratio=2",
    f"plugins.prompt_augmentation.templates=[{Path(__file__).parents[2] / 'benchmarks/short_templates.yaml'}]",
    "plugins.prompt_augmentation.validation=plain",
)


@pytest.fixture(scope="module")
def sampling(out: Path) -> Training:
    """Recipes siri, mopps and prompt_augmentation combined, mode sync: four steps, every budget another."""
    return train(SAMPLING, out / "sampling", *four_steps(out / "sampling"), *SAMPLING_SETTINGS)


@pytest.fixture(scope="module")
def pair(sampling: Training, out: Path) -> tuple[Training, Training]:
    """The four steps, and their last two again, in another folder from the checkpoint between."""
    folder = out / "sampling_resumed"
    path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={sampling.out / 'global_step_2'}")
    return sampling, train(SAMPLING, folder, *four_steps(folder), *SAMPLING_SETTINGS, *path)


class TestSampling(Resuming):
    """What the three methods remember, or need not: pools and counts, templates, the place in the cycle."""

    def test_budgets_go_on_in_their_phase(self, pair: tuple[Training, Training]) -> None:
        whole, resumed = pair
        assert [step["plugins/siri/max_length"] for step in whole.steps] == [16, 13, 7, 4]
        assert [step["plugins/siri/max_length"] for step in resumed.steps] == [7, 4]
        assert [step["plugins/siri/phase"] for step in resumed.steps] == [0, 1]

    def test_the_pass_over_the_dataset_goes_on(self, pair: tuple[Training, Training]) -> None:
        for run in pair:
            state = json.loads((run.out / "global_step_4/plugins/state.json").read_text())
            assert state["states"]["driver"]["mopps"]["json"]["place"] == 4 * 2 * PROMPTS
            assert {step["plugins/mopps/passes"] for step in run.steps} == {1}
        arrays = load_file(pair[1].out / "global_step_4/plugins/arrays.safetensors")
        assert arrays["driver/mopps/right"].sum() + arrays["driver/mopps/wrong"].sum() == 4 * PROMPTS * 8
        prompts = [prompt_id for prompt_id, _, _ in pair[0].draws()]
        assert len(set(prompts)) == 4 * PROMPTS

    def test_every_group_has_a_format(self, pair: tuple[Training, Training]) -> None:
        for run in pair:
            for step in run.steps:
                counts = [value for key, value in step.items() if key.startswith("plugins/prompt_augmentation/count/")]
                assert len(counts) > 1 and sum(counts) == 8 * PROMPTS
                assert step["actor/grad_norm"] > 0.01
                assert step["training/rollout_probs_diff_max"] < 1e-3
