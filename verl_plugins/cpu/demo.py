"""`verl-plugins demo`: train the recipe `vade` on a CPU preset, then say what happened in tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_plugins.errors import RunError, printable

RECIPE = "vade"
ANSWERS = "validation"
"""Folder of the run with what was answered in validations, as verl writes it: `<step>.jsonl`."""
SHOWN = 3
"""Prompts whose answers are printed."""
WINDOW = 5
"""Steps averaged at the start and at the end of the run."""
CURVES = {
    "accuracy of the step's rollouts": "health/accuracy",
    "mixed groups": "health/mixed_groups",
    "entropy (nats per token)": "actor/entropy",
    "seconds per step": "seconds",
}


def demo(out: Path, preset: str = "cpu") -> int:
    """Train, then summarise; returns the exit code."""
    from verl_plugins.bridge.launch import launch
    from verl_plugins.composition.compose import compose
    from verl_plugins.composition.look import look
    from verl_plugins.composition.needs import check

    out = Path(out).absolute()
    composed = compose(RECIPE, preset, ())
    composed.config.trainer.validation_data_dir = str(out / ANSWERS)
    if not composed.prepare:
        raise RunError(f"--preset {preset} makes no model and data of its own: choose cpu, cpu-vllm or smollm2")
    look(composed, check(composed), out)
    code = launch(composed, out=out)
    if code == 0:
        steps, validations = read_metrics(out / "metrics.jsonl")
        console = Console()
        console.print(summary(steps, validations, preset))
        if len(validations) > 1:
            first, last = (out / ANSWERS / f"{step}.jsonl" for step in (validations[0][0], validations[-1][0]))
            console.print(answers(first, last))
        picture = draw(steps, validations, out / "curves.png")
        console.print(f"curves: {picture}")
    return code


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, dict[str, float]]]]:
    """Training steps and validations of a run's metrics file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    validations = [(record["step"], record["validation"]) for record in records if "validation" in record]
    return [record for record in records if "timing_s/step" in record], validations


def validation_accuracy(metrics: dict[str, float]) -> float:
    """Mean accuracy of sampled answers."""
    return next(value for key, value in metrics.items() if key.startswith("val-core/") and "/acc/mean@" in key)


def answers(first: Path, last: Path) -> Table:
    """What the model said to a few held-out prompts in two validations; its text is shown and never interpreted."""
    before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in (first, last))
    table = Table(title="held-out prompts")
    for heading in ("prompt", "right answer", "before", "after"):
        table.add_column(heading)
    said = {row["input"]: row["output"] for row in reversed(after)}
    for row in list({row["input"]: row for row in reversed(before)}.values())[-SHOWN:]:
        told = (row["input"], row["gts"], row["output"], said.get(row["input"], ""))
        table.add_row(*[Text(printable(" ".join(str(text).split()))) for text in told])
    return table


def summary(steps: Sequence[dict], validations: Sequence[tuple[int, dict]], preset: str) -> Table:
    """Before and after."""
    table = Table(title=f"{RECIPE} on the {preset} preset, {len(steps)} steps")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    if len(validations) > 1:
        before, after = validation_accuracy(validations[0][1]), validation_accuracy(validations[-1][1])
        table.add_row("accuracy of sampled answers, held-out prompts", f"{before:.3f}", f"{after:.3f}")
    for title, key in list(CURVES.items())[1:3]:
        first, last = _mean(steps[:WINDOW], key), _mean(steps[-WINDOW:], key)
        table.add_row(f"{title} (mean of {WINDOW} steps)", f"{first:.3f}", f"{last:.3f}")
    return table


def _mean(steps: Sequence[dict], key: str) -> float:
    return sum(step[key] for step in steps) / len(steps)


def draw(steps: Sequence[dict], validations: Sequence[tuple[int, dict]], path: Path) -> Path:
    """The curves of the run as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    numbers = [step["step"] for step in steps]
    for axis, (title, key) in zip(axes.flat, CURVES.items(), strict=True):
        axis.plot(numbers, [step[key] for step in steps], label="training step")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    if validations:
        points = [(step, validation_accuracy(metrics)) for step, metrics in validations]
        axes.flat[0].plot(*zip(*points, strict=True), "o--", label="held-out prompts")
        axes.flat[0].legend()
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
