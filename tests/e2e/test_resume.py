"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import SHORT, Training, train

pytestmark = pytest.mark.e2e


def overrides(folder: Path) -> list[str]:
    dump = f"trainer.rollout_data_dir={folder / 'rollouts'}"
    return [*SHORT, dump, "trainer.total_training_steps=4", "trainer.save_freq=2"]


class TestResume:
    """Four steps, or two, a stop, and two more: the same prompts, the same plugin state, bit for bit."""

    @pytest.fixture(scope="class")
    def resumed(self, vade: Training, out: Path) -> Training:
        """What a kill after the first checkpoint leaves, and a half-written one, started again."""
        folder = out / "resumed"
        folder.mkdir()
        shutil.copytree(vade.out / "global_step_2", folder / "global_step_2")
        (folder / "latest_checkpointed_iteration.txt").write_text("2")
        (folder / "global_step_4" / ".plugins.123").mkdir(parents=True)
        return train("vade", folder, *overrides(folder))

    def test_it_says_where_it_goes_on(self, resumed: Training) -> None:
        assert "resuming after step 2 from" in resumed.output
        assert [step["step"] for step in resumed.steps] == [3, 4]

    def test_the_same_prompts_are_drawn(self, vade: Training, resumed: Training) -> None:
        assert resumed.draws() == [draw for draw in vade.draws() if draw[2] > 2]

    def test_the_same_answers_are_generated_and_scored(self, vade: Training, resumed: Training) -> None:
        for step in (3, 4):
            one, other = ((run.out / f"rollouts/{step}.jsonl").read_text().splitlines() for run in (vade, resumed))
            one, other = ([json.loads(line) for line in lines] for lines in (one, other))
            assert [(row["uid"], row["output"], row["score"]) for row in one] == [
                (row["uid"], row["output"], row["score"]) for row in other
            ]

    def test_the_same_state_bit_for_bit(self, vade: Training, resumed: Training) -> None:
        one, other = (run.out / "global_step_4" / "plugins" for run in (vade, resumed))
        assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())
        arrays, again = load_file(one / "arrays.safetensors"), load_file(other / "arrays.safetensors")
        assert arrays.keys() == again.keys()
        assert [name for name in arrays if not torch.equal(arrays[name], again[name])] == []
        before = load_file(vade.out / "global_step_2" / "plugins" / "arrays.safetensors")
        assert any(not torch.equal(before[name], arrays[name]) for name in arrays)

    def test_the_same_metrics(self, vade: Training, resumed: Training) -> None:
        for one, other in zip(vade.steps[2:], resumed.steps, strict=True):
            for key in ("health/accuracy", "actor/entropy", "actor/loss", "actor/grad_norm", "actor/lr"):
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
