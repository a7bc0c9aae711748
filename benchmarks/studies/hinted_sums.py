"""A task for hints: hard sums with worked solutions, and a model that can make hints of them and use them.

The model is the CPU preset's. Its teacher is nearly always wrong where digits are large, answers a request for hints
(`H3+8+9=|11 20`) with an object of two levels, and is often right when a hint says the first step (`3+8+9= 11=`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from worked_sums import BATCH, not_held_out, overrides, write_model

from verl_plugins.cpu.task import TaskSettings, write_task

STEPS = 900
PLAIN = (0.9, 0.3, 0.02, 0.0)
"""How often the teacher is right, by the number of large digits."""
HINTED = 0.6
WORDING = Path(__file__).with_name("hinted_sums.yaml")


def solution(prompt: str) -> str:
    """The running sums after the first term: `3+8+9=` -> `11 20`."""
    a, b, c = map(int, prompt.rstrip("=").split("+"))
    return f"{a + b} {a + b + c}"


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches of plain prompts, requests for hints and prompts with a hint, a third each."""
    rng, sums = random.Random(0), not_held_out()
    for _ in range(STEPS):
        batch = []
        for number, item in enumerate(rng.choices(sums, k=BATCH)):
            steps = solution(item.prompt)
            first = steps.split()[0]
            if number % 3 == 1:
                batch.append((f"H{item.prompt}|{steps}", json.dumps({"level_1": first, "level_2": steps})))
                continue
            right = rng.random() < (HINTED if number % 3 else PLAIN[item.level])
            answer = item.answer if right else max(item.answer + rng.choice((-1, 1)) * rng.randint(1, 8), 0)
            batch.append((f"{item.prompt} {first}=" if number % 3 else item.prompt, str(answer)))
        yield batch


def prepare(folder: Path) -> list[str]:
    """Make model, data and wording in the folder unless they are there; the overrides that use them."""
    if not (folder / "model").is_dir():
        write_task(folder, TaskSettings())
        for file in (folder / "train.parquet", folder / "val.parquet"):
            rows = pd.read_parquet(file)
            asked = rows["prompt"].str[0].str["content"]
            rows["extra_info"] = [
                {**info, "solution": solution(text)} for info, text in zip(rows["extra_info"], asked, strict=True)
            ]
            rows.to_parquet(file)
        write_model(folder, lessons(), STEPS, longest=48)
    return [*overrides(folder), "data.max_prompt_length=64"]
