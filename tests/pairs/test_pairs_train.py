"""Every two recipes that meet on a stage train two steps together.

With `PAIRS_RECORD=FILE` the names of those that did are written there; `docs/pairs.md` shows what `docs/pairs.txt` has.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
from few_steps import PRESETS, needed
from training import SHORT, train

from verl_plugins.commands import pairs

PAGE = Path(__file__).parents[2] / "docs/pairs.md"
TOGETHER = sorted(
    {
        tuple(sorted((name, other)))
        for name, met in re.findall(r"^\| \[`(\w+)`\]\S+ \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
        for other in re.findall(r"(\w+)\*{0,2} \(`", met)
    }
)


@pytest.mark.parametrize(("first", "second"), TOGETHER)
def test_they_train(first: str, second: str, tmp_path: Path) -> None:
    preset = next((PRESETS[name] for name in (first, second) if name in PRESETS), "cpu")
    words = needed([first, second], tmp_path)
    (pair,) = [pair for pair in pairs.pairs(first, preset, words) if pair.other(first) == second]
    assert pair.refused == ""
    steps = "trainer.total_training_steps=2"
    training = train(f"{first}+{second}", tmp_path / "run", *SHORT, steps, *pair.settled, *words, preset=preset)
    assert [step["step"] for step in training.steps] == [1, 2]
    for step in training.steps:
        assert math.isfinite(step["actor/grad_norm"]) and math.isfinite(step["health/accuracy"])
    if record := os.environ.get("PAIRS_RECORD"):
        with open(record, "a") as file:
            file.write(f"{first}+{second}\n")
