"""What a finished run leaves for the tables of a study, and the file that keeps it: its folder may be deleted then."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_plugins.commands.curves import TOKENS, read_run, tokens_so_far
from verl_plugins.commands.study.columns import Column, at_budget, validations
from verl_plugins.errors import RunError

FILE = "study.json"
FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One run: held-out accuracy over its cost, and the columns."""

    run: str
    """Name of its folder, made of variant, settings and seed."""
    variant: str
    seed: int
    steps: int
    tokens: float | None
    """Generated for training in all, trained on or not; None where they were not counted."""
    seconds: float
    """In training steps, without start and validation."""
    curve: Sequence[tuple[int, float | None, float]]
    """Of each validation: step, tokens so far, accuracy."""
    values: Mapping[str, float | None]
    """Column -> number."""

    def accuracy(self, budget: str, at: float) -> float | None:
        """Held-out accuracy when the run had cost so much."""
        place = 1 if budget == "tokens" else 0
        points = [(point[place], point[2]) for point in self.curve]
        return None if any(cost is None for cost, _ in points) else at_budget(points, at)

    def cost(self, budget: str) -> float | None:
        """Of its last validation."""
        return self.curve[-1][1 if budget == "tokens" else 0] if self.curve else None


def measure(folder: Path, variant: str, seed: int, columns: Sequence[Column]) -> Result:
    """Read a run.

    Raises:
        RunError: it has no metrics, or was never validated.
    """
    run = read_run(str(folder))
    points = validations(run)
    if points.empty:
        raise RunError(f"{folder} has no held-out accuracy: set data.val_files and leave trainer.test_freq positive")
    counted = TOKENS in run.steps and run.steps.loc[run.steps["step"].notna(), TOKENS].notna().all()
    tokens = tokens_so_far(run) if counted else None
    known = {column.title: column.measure(run) for column in columns if column.measure}
    return Result(
        run=folder.name,
        variant=variant,
        seed=seed,
        steps=run.last_step,
        tokens=float(tokens.dropna().iloc[-1]) if counted else None,
        seconds=float(run.steps["seconds"].sum()) if "seconds" in run.steps else 0.0,
        curve=[(int(step), float(tokens[step]) if counted else None, float(value)) for step, value in points.items()],
        values=known,
    )


def read(out: Path) -> dict[str, Result]:
    """Run -> result, of the study in this folder so far.

    Raises:
        RunError: the file is there and is not one of a study.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}")
        found = [Result(**one) for one in tree["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not what a study writes ({error}): move it away, or name another --out") from error
    return {one.run: one for one in found}


def write(out: Path, results: Sequence[Result], more: Mapping[str, Any]) -> Path:
    """Keep all results, and what is made of them; the file is there as a whole or as it was."""
    path = out / FILE
    whole = path.with_name(f".{FILE}.{os.getpid()}")
    ordered = sorted(results, key=lambda one: (one.variant, one.seed))
    tree = {"format": FORMAT, **more, "results": [asdict(one) for one in ordered]}
    whole.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, path)
    return path
