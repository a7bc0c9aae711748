"""One task for every recipe: sums, worked out or guessed, in a form that the scorer takes or refuses.

`3+4+9=` is answered at once ("`16`"), worked out ("7 `16`") or with numbers that are said over and over, which may take
all the room there is. Worked answers are right more often. The final answer stands between ticks; sometimes it ends in
a question mark instead ("7 16?"), which the scorer `math_verify` takes for no answer. Level 0 is solved by everybody,
level 3 by nobody: its sums have five numbers. The model is the CPU preset's, warmed up on a teacher who does all of
this, and who knows the prompts that some recipes write.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from worked_sums import BATCH, overrides, warm_up

from verl_plugins.cpu import warmup
from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.cpu.task import Sum, TaskSettings, all_sums, split_sums, write_task
from verl_plugins.cpu.warmup import WarmupSettings

TASK = TaskSettings(train_rows=128, val_rows=96)
FIRST, STEPS, EXACT, LONGEST = 400, 640, 380, 40
"""Lessons of nothing but right sums, all others, how many of these are before the teacher is noisy, and the longest
answer in tokens."""
ROOM = 24
"""Tokens of a response."""
HARD = TASK.levels - 1
"""The level of the sums of five numbers, which the teacher cannot do."""
STYLES = ("direct", "worked", "rambling")
STYLE = ((0.6, 0.4, 0.0), (0.4, 0.3, 0.3), (0.35, 0.3, 0.35), (0.35, 0.3, 0.35))
"""How often the teacher answers in each style, by level."""
RIGHT = ((1.0, 1.0, 1.0), (0.65, 0.9, 0.95), (0.3, 0.65, 0.75), (0.0, 0.0, 0.0))
"""How often it is right, by level and style."""
REFUSED = (0.0, 0.3, 0.4, 0.4)
"""How often it ends in a question mark, by level."""
OFF_BY = 10
"""Its largest mistake on levels that it knows something of."""
GUESSES = (16, 19)
"""What it says on the hard level, where most sums are larger."""
REPEATS = 0.75
"""Probability to say a number once more while rambling."""
HINTED, AGAIN = 0.8, 0.2
"""How often it is at least right with a hint, and with a failed answer in sight."""
KEPT = 0.5
"""How often it keeps a format that is asked for."""


def running_sums(prompt: str) -> list[int]:
    """`3+4+9=` -> 3, 7, 16."""
    terms = [int(term) for term in prompt.rstrip("=").split("+")]
    return [sum(terms[: place + 1]) for place in range(len(terms))]


def solution(prompt: str) -> str:
    """The last two running sums: `3+4+9=` -> `7 16`."""
    return " ".join(map(str, running_sums(prompt)[-2:]))


def put(item: Sum) -> Sum:
    """The sum that is asked for an item of `TASK`: on the hard level it has two small numbers more, always the same."""
    if item.level < HARD:
        return item
    more = random.Random(item.prompt).choices(range(TASK.large_from), k=2)
    prompt = item.prompt.replace("=", "".join(f"+{number}" for number in more) + "=")
    return Sum(prompt, item.answer + sum(more), item.level)


def calculation(item: Sum, style: str, right: float, rng: random.Random) -> tuple[str, int]:
    """The steps as they are said, right with this probability, and the final number; a mistake is carried along."""
    before, total = running_sums(item.prompt)[-2:]
    wrong = rng.random() >= right
    if wrong and item.level == HARD:
        before, total = GUESSES[0], rng.choice(GUESSES)
    elif wrong:
        off = rng.choice((-1, 1)) * rng.randint(1, OFF_BY)
        before, total = max(before + rng.choice((0, off)), 0), max(total + off, 0)
    said = [str(before)] if style == "worked" else []
    for number in (before, total) if style == "rambling" else ():
        said.append(str(number))
        while rng.random() < REPEATS:
            said.append(str(number))
    return " ".join(said), total


@dataclass(frozen=True)
class Teacher:
    """Answers as said above; before it is noisy, always in the right form, and right on all levels but the hard one."""

    rng: random.Random
    noisy: bool = True

    def plain(self, item: Sum, least: float = 0.0, most: float = 1.0) -> str:
        """An answer in one of the styles and forms, right at least and at most so often."""
        weights = STYLE[item.level] if self.noisy else (2, 2, 1)
        (style,) = self.rng.choices(STYLES, weights)
        usual = RIGHT[item.level][STYLES.index(style)]
        said, total = calculation(item, style, self._right(item, min(max(usual, least), most)), self.rng)
        if self.noisy and self.rng.random() < REFUSED[item.level]:
            return f"{said} {total}?".lstrip()[: ROOM + 1]
        return f"{said} `{total}`".lstrip()[: ROOM + 1]

    def formatted(self, item: Sum) -> tuple[str, str]:
        """A prompt that asks for one of the formats of `common_task.yaml`, and an answer that often keeps it."""
        said, total = calculation(item, "worked", self._right(item, RIGHT[item.level][1]), self.rng)
        prompt, kept = self.rng.choice(
            (
                (f"w {item.prompt}", f"{said} >`{total}`"),
                (f"m {item.prompt}", f"####{total}"),
                (f"b {item.prompt}=", f"`{total}`."),
            )
        )
        return prompt, kept if self.rng.random() < KEPT else self.plain(item)

    def request(self, item: Sum) -> tuple[str, str]:
        """A request for hints, and the two of them."""
        steps = solution(item.prompt)
        return f"H{item.prompt}|{steps}", json.dumps({"level_1": steps.split()[0], "level_2": steps})

    def again(self, item: Sum) -> tuple[str, str]:
        """A prompt with a failed answer in sight."""
        failed = self.plain(item, most=0.0)[:ROOM]
        return f"{item.prompt}{failed}\n{item.prompt}", self.plain(item, least=AGAIN)

    def hinted(self, item: Sum) -> tuple[str, str]:
        """A prompt with the first step as a hint."""
        return f"{item.prompt} {solution(item.prompt).split()[0]}=", self.plain(item, least=HINTED)

    def _right(self, item: Sum, usual: float) -> float:
        return usual if self.noisy or item.level == HARD else 1.0


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches for the warm-up, every sixth of long prompts, levels evenly; no held-out prompt is in them."""
    rng, held_out = random.Random(0), set(split_sums(TASK)[1])
    taught = [[item for item in all_sums(TASK) if item.level == level] for level in range(TASK.levels)]
    taught = [[put(item) for item in items if item not in held_out] for items in taught]
    for step in range(STEPS):
        teacher, batch = Teacher(rng, step >= EXACT), []
        for number in range(BATCH):
            item = rng.choice(taught[number // 4 % TASK.levels])
            if step % 6 == 5:
                batch.append((teacher.request, teacher.again)[number % 2](item))
            elif number % 4 < 3:
                batch.append((item.prompt, teacher.plain(item)))
            else:
                batch.append(rng.choice((teacher.hinted, teacher.formatted))(item))
        yield batch


def prepare(folder: Path) -> list[str]:
    """Make model and data in the folder unless they are there; the overrides that use them."""
    if not (folder / "model").is_dir():
        write_task(folder, TASK)
        for name in ("train", "val"):
            rows = pd.read_parquet(folder / f"{name}.parquet")
            _ask(rows)
            rows.to_parquet(folder / f"{name}.parquet")
        _write_model(folder)
    return overrides(folder)


def _ask(rows: pd.DataFrame) -> None:
    """Put the sums that are asked into the rows in place, with their solutions."""
    for row in rows.to_dict("records"):
        info, (message,) = row["extra_info"], row["prompt"]
        asked = put(Sum(message["content"], int(row["reward_model"]["ground_truth"]), info["level"]))
        message["content"], info["solution"] = asked.prompt, solution(asked.prompt)
        row["reward_model"]["ground_truth"] = str(asked.answer)


def _write_model(folder: Path) -> None:
    """Warm the model up, on sums alone and then on the teacher; it appears in the folder when it is complete."""
    tokenizer, model = make_tokenizer(), make_model()
    sums = WarmupSettings(steps=FIRST, teacher_accuracy=(1, 1, 1, 1), exact_until=0, noisy_from=0.01)
    warmup.warm_up(model, tokenizer, sums, TASK)
    warm_up(model, tokenizer, lessons(), STEPS, LONGEST)
    tokenizer.save_pretrained(folder / "unfinished")
    model.save_pretrained(folder / "unfinished")
    (folder / "unfinished").rename(folder / "model")


if __name__ == "__main__":
    print("\n".join(prepare(Path(sys.argv[1]))))
