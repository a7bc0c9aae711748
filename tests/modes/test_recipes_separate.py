"""Every training recipe trains two steps in `separate_async`, on rollouts of which those of the second are stale."""

from __future__ import annotations

from pathlib import Path

import pytest
from few_steps import PARTNERS, PRESETS, RECIPES, UNEQUAL, needed
from training import SHORT, healthy, train

MODE = ("trainer.v1.trainer_mode=separate_async", "trainer.total_training_steps=2")


@pytest.mark.parametrize("name", RECIPES)
def test_trains(name: str, out: Path, tmp_path: Path) -> None:
    words = (*SHORT, *MODE, *needed([name], tmp_path))
    training = train(PARTNERS.get(name, name), out / name, *words, preset=PRESETS.get(name, "cpu"))
    healthy(training, 2, on_policy=False, equal_groups=name not in UNEQUAL)
    assert training.steps[0]["health/lag_steps_max"] == 0
    assert training.steps[1]["health/lag_steps_max"] in (0, 1)
    assert training.steps[1]["weights/megabytes"] > 1
