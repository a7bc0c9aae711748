"""A task whose answers vary in length: sums worked out step by step, each step said over and over.

`3+4+9=` is answered `3 3 3 7 7 16`: the running sums, each repeated a random number of times. The model is the CPU
preset's, warmed up on a teacher who repeats a lot and errs at times, so that responses are long for no use.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.cpu.task import Sum, TaskSettings, all_sums, split_sums, write_task

STEPS, BATCH, RATE = 400, 64, 2e-3
REPEATS, ERRS = 0.6, 0.1
"""Probability to say a number once more, and to be off by 1 to 3 in a step."""
LONGEST = 32
"""Widest response budget in tokens; lessons are cut at 40."""


def worked(prompt: str, rng: random.Random) -> str:
    """The teacher's answer to a prompt."""
    total, numbers = 0, []
    for term in map(int, prompt.rstrip("=").split("+")):
        total = max(total + term + (rng.choice((-3, -2, -1, 1, 2, 3)) if rng.random() < ERRS else 0), 0)
        numbers.append(str(total))
        while rng.random() < REPEATS:
            numbers.append(str(total))
    return " ".join(numbers)


def prepare(folder: Path) -> list[str]:
    """Make model and data in the folder unless they are there; the overrides that use them."""
    if not (folder / "model").is_dir():
        write_task(folder, TaskSettings())
        write_model(folder, lessons(), STEPS, longest=40)
    return [*overrides(folder), f"data.max_response_length={LONGEST}"]


def write_model(folder: Path, batches: Iterable[list[tuple[str, str]]], steps: int, longest: int) -> None:
    """Warm a model up and put it into the folder; it appears there when it is complete."""
    tokenizer, model = make_tokenizer(), make_model()
    warm_up(model, tokenizer, batches, steps, longest)
    tokenizer.save_pretrained(folder / "unfinished")
    model.save_pretrained(folder / "unfinished")
    (folder / "unfinished").rename(folder / "model")


def overrides(folder: Path) -> list[str]:
    """The settings that use model and data of the folder."""
    files = {
        "actor_rollout_ref.model.path": "model",
        "data.train_files": "train.parquet",
        "data.val_files": "val.parquet",
    }
    return [f"{key}={folder.absolute() / name}" for key, name in files.items()]


def not_held_out() -> list[Sum]:
    """The sums that may be taught."""
    held_out = set(split_sums(TaskSettings())[1])
    return [item for item in all_sums(TaskSettings()) if item not in held_out]


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches of prompts and the teacher's answers."""
    rng, prompts = random.Random(0), [item.prompt for item in not_held_out()]
    for _ in range(STEPS):
        yield [(prompt, worked(prompt, rng)) for prompt in rng.choices(prompts, k=BATCH)]


def warm_up(
    model: torch.nn.Module, tokenizer, batches: Iterable[list[tuple[str, str]]], steps: int, longest: int
) -> None:
    """Next-token prediction of answers, cut at `longest` tokens, to prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, cycle_momentum=False)
    torch.set_num_threads(1)
    for batch in batches:
        rows, starts = [], []
        for prompt, answer in batch:
            start, target = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
            rows.append([*start, *[*target, tokenizer.eos_token_id][:longest]])
            starts.append(len(start))
        length = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        place = torch.arange(length)
        targets = ids.masked_fill(place < torch.tensor(starts)[:, None], -100)
        targets = targets.masked_fill(place >= torch.tensor([len(row) for row in rows])[:, None], -100)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    print("\n".join(prepare(Path(sys.argv[1]))))
