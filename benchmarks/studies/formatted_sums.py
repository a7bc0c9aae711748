"""A task for formats: sums answered in the format of the prompt's mark, by a model that often forgets the format.

`3+8+9=` is answered `20`, with the mark of a worked answer `11 20`, of a marked one `# 20`, and of one that begins
with `=` by `20.`. The teacher errs as the CPU preset's does, and half of the time answers in the plain format.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from worked_sums import BATCH, not_held_out, overrides, write_model

from verl_plugins.cpu.task import TaskSettings, write_task

STEPS = 900
RIGHT = (0.9, 0.6, 0.3, 0.1)
"""How often the teacher is right, by the number of large digits."""
KEPT = 0.5
"""How often the format is kept."""
TEMPLATES = Path(__file__).with_suffix(".yaml")


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches of prompts in the formats of `TEMPLATES`, and the teacher's answers."""
    rng, sums = random.Random(0), not_held_out()
    for _ in range(STEPS):
        batch = []
        for number, item in enumerate(rng.choices(sums, k=BATCH)):
            right = rng.random() < RIGHT[item.level]
            answer = str(item.answer if right else max(item.answer + rng.choice((-1, 1)) * rng.randint(1, 8), 0))
            first = sum(map(int, item.prompt.split("+")[:2]))
            prompt, kept = (
                (item.prompt, answer),
                (f"w {item.prompt}", f"{first} {answer}"),
                (f"m {item.prompt}", f"# {answer}"),
                (f"b {item.prompt}=", f"{answer}."),
            )[number % 4]
            batch.append((prompt, kept if rng.random() < KEPT else answer))
        yield batch


def prepare(folder: Path) -> list[str]:
    """Make model and data in the folder unless they are there; the overrides that use them."""
    if not (folder / "model").is_dir():
        write_task(folder, TaskSettings())
        write_model(folder, lessons(), STEPS, longest=16)
    return overrides(folder)
