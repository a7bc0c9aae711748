"""The task of the CPU preset: sums such as ``3+4+9=``, harder with every large digit, in verl's parquet schema."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

DATA_SOURCE = "verl_plugins/arithmetic"


class Sum(NamedTuple):
    """A prompt, the number it asks for, and its level: how many of its digits are large."""

    prompt: str
    answer: int
    level: int


@dataclass(frozen=True)
class TaskSettings:
    """Size and difficulty of the task. A digit is large from ``large_from`` on, so levels run from 0 to ``terms``.

    Raises:
        ValueError: if a setting is out of range, or there are fewer different prompts than rows.
    """

    train_rows: int = 512
    val_rows: int = 128
    terms: int = 3
    large_from: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.terms <= 5 and 1 <= self.large_from <= 9 and self.train_rows >= 1 and self.val_rows >= 1):
            raise ValueError(f"Out of range (terms 1 to 5, large_from 1 to 9, at least one row each): {self}.")
        rows, prompts = self.train_rows + self.val_rows, 10**self.terms
        if rows > prompts:
            raise ValueError(f"{rows} rows were asked for, but only {prompts} different prompts exist.")

    @property
    def levels(self) -> int:
        """Number of levels of difficulty."""
        return self.terms + 1


def all_sums(settings: TaskSettings) -> list[Sum]:
    """Every sum of the task once, in a fixed order."""
    return [
        Sum("+".join(map(str, digits)) + "=", sum(digits), sum(digit >= settings.large_from for digit in digits))
        for digits in itertools.product(range(10), repeat=settings.terms)
    ]


def split_sums(settings: TaskSettings) -> tuple[list[Sum], list[Sum]]:
    """Train and held-out sums, all different, in random order, levels as even as the number of prompts allows."""
    rng = random.Random(settings.seed)
    by_level: list[list[Sum]] = [[] for _ in range(settings.levels)]
    for item in all_sums(settings):
        by_level[item.level].append(item)
    train: list[Sum] = []
    val: list[Sum] = []
    total = settings.train_rows + settings.val_rows
    # Small levels first: what they cannot give, the larger ones share.
    for rank, sums in enumerate(sorted(by_level, key=len)):
        chosen = len(train) + len(val)
        count = min(len(sums), -(-(total - chosen) // (settings.levels - rank)))
        # Rounding the running total, not each level, makes the held-out parts add up to val_rows.
        held_out = (chosen + count) * settings.val_rows // total - len(val)
        drawn = rng.sample(sums, count)
        val += drawn[:held_out]
        train += drawn[held_out:]
    rng.shuffle(train)
    rng.shuffle(val)
    return train, val


def write_task(folder: Path, settings: TaskSettings = TaskSettings()) -> tuple[Path, Path]:
    """Write ``train.parquet`` and ``val.parquet`` into ``folder``, return their paths; equal settings, equal bytes."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    train, val = split_sums(settings)
    paths = folder / "train.parquet", folder / "val.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows(train, "train")), paths[0])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows(val, "val")), paths[1])
    return paths


def _rows(sums: list[Sum], split: str) -> list[dict[str, Any]]:
    """Rows in verl's schema."""
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": item.prompt}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(item.answer)},
            "extra_info": {"index": index, "split": split, "level": item.level},
        }
        for index, item in enumerate(sums)
    ]
