"""Starts real trainings as a user starts them, and reads what they leave behind."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import warm

from verl_plugins.cpu.demo import read_metrics

COMMAND = Path(sys.executable).with_name("verl-plugins")
TIMEOUT = 800
PROMPTS, ROWS_OF_DATASET = 16, 512
"""Of a step, and of all, on the preset cpu."""
NAN_ON_PURPOSE = ("variance_proxy", "perf/mfu")
SHORT = ("trainer.val_before_train=false", "trainer.test_freq=-1")


def four_steps(folder: Path) -> list[str]:
    """Four steps that are the same whenever they are run, a checkpoint after the second, and a dump of rollouts."""
    dump = f"trainer.rollout_data_dir={folder / 'rollouts'}"
    same = "actor_rollout_ref.rollout.full_determinism=true"
    return [*SHORT, dump, same, "trainer.total_training_steps=4", "trainer.save_freq=2"]


@dataclass
class Training:
    """A finished run."""

    out: Path
    returncode: int
    output: str
    """What the terminal showed."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Metrics of each step."""
        return read_metrics(self.out / "metrics.jsonl")[0]

    @property
    def validations(self) -> list[tuple[int, dict[str, float]]]:
        """Step and metrics of each validation."""
        return read_metrics(self.out / "metrics.jsonl")[1]

    @property
    def log(self) -> str:
        """verl's own output."""
        return (self.out / "verl.log").read_text(errors="replace")

    def draws(self) -> list[tuple[int, int, int]]:
        """(prompt id, step it was drawn in, step it was trained in) of every group, from the dump of rollouts."""
        found = set()
        for file in (self.out / "rollouts").glob("*.jsonl"):
            for line in file.read_text().splitlines():
                uid = json.loads(line)["uid"].rsplit("_", 2)[0]
                prompt_id, drawn, _ = map(int, uid.split("-"))
                found.add((prompt_id, drawn, int(file.stem)))
        return sorted(found)


def command(recipe: str, out: Path, *overrides: str, preset: str = "cpu") -> list[str]:
    """`verl-plugins run RECIPE --preset PRESET` as an argument list."""
    return [str(COMMAND), "run", recipe, "--preset", preset, "--out", str(out), *overrides]


def train(
    recipe: str, out: Path, *overrides: str, preset: str = "cpu", site: Path | None = None, check: bool = True
) -> Training:
    """Run it to its end; `site` is a folder to put on the import path of all its processes."""
    paths = [str(site)] if site else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    terminal = out.with_suffix(".terminal")
    code = warm.run(command(recipe, out, *overrides, preset=preset)[1:], environment, terminal, TIMEOUT)
    training = Training(out, code, terminal.read_text(errors="replace"))
    if check:
        tail = training.log[-3000:] if (out / "verl.log").exists() else ""
        assert code == 0, f"{training.output}\n{tail}"
    return training


def ours(step: dict[str, float], plugin: str) -> dict[str, float]:
    """The step's metrics of one plugin."""
    prefix = f"plugins/{plugin}/"
    return {key.removeprefix(prefix): value for key, value in step.items() if key.startswith(prefix)}


def healthy(training: Training, steps: int, *, on_policy: bool = True, equal_groups: bool = True) -> None:
    """All steps are there, all numbers are finite, the weights moved, and rollout and actor agree on log-probs."""
    assert [step["step"] for step in training.steps] == list(range(1, steps + 1))
    for step in training.steps:
        wrong = [k for k, v in step.items() if not (isinstance(v, (int, float)) and math.isfinite(v))]
        assert [key for key in wrong if not any(part in key for part in NAN_ON_PURPOSE)] == []
        assert step["actor/grad_norm"] > 0.01 or step["health/mixed_groups"] == 0
        assert 0 < step["actor/entropy"] < math.log(260)
        shares = [step[f"health/{kind}_groups"] for kind in ("mixed", "all_right", "all_wrong")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        if equal_groups:
            assert shares[1] <= step["health/accuracy"] <= 1 - shares[2]
        assert step["rollout/tokens"] >= step["health/generated_tokens"] > 0
        if on_policy:
            assert step["training/rollout_probs_diff_max"] < 1e-3
    for line in (f"step    {number}/{steps}" for number in range(1, steps + 1)):
        assert line in training.output
