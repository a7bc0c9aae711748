"""What the preset `roles` needs: sums that two roles work out one after the other, and a tiny model that can play both.

Of `3+4+9=` the planner makes `7+9=`, and the solver, who sees nothing else, `16`. Both are one policy, told apart by
the system message, and the reward is the answer's. The warm-up teaches both parts, and then a teacher that is right
only sometimes. Some lessons have a note in brackets in the prompt, so that what plugins write there is no surprise.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.composition.cache import cache_folder, make_once
from verl_plugins.composition.settings import typed
from verl_plugins.cpu.model import ModelSettings, make_model, make_tokenizer
from verl_plugins.cpu.preset import enter
from verl_plugins.cpu.warmup import Progress, show_progress, train

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

DATA_SOURCE, LOOP = "verl_plugins/roles", "relay"
WORDS = {"planner": "plan", "solver": "solve"}
"""What begins the system message of each role."""
FORMAT = 1
"""Part of the cache key: raise it when the code here changes what is written."""
TERMS = 3
LOOPS = f"- name: {LOOP}\n  _target_: verl_plugins.cpu.roles_loop.Relay\n"
NOTED = "[]<>_=/0123456789abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class RolesSettings:
    """The task.

    Raises:
        ValueError: if a setting is out of range.
    """

    train_rows: int = 512
    val_rows: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train_rows < 1 or self.val_rows < 1 or self.train_rows + self.val_rows > 10**TERMS:
            raise ValueError(f"Out of range (at least one row each, {10**TERMS} in all): {self}.")


@dataclass(frozen=True)
class LessonSettings:
    """The warm-up: for `exact_until` (a fraction) of its steps the teacher is always right, afterwards with `right`.

    Raises:
        ValueError: if a setting is out of range.
    """

    steps: int = 500
    batch: int = 64
    lr: float = 2e-3
    right: float = 0.6
    noted: float = 0.35
    exact_until: float = 0.6
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.threads) < 1 or self.lr <= 0:
            raise ValueError(f"steps, batch, threads and lr must be positive: {self}.")
        if not all(0 <= share <= 1 for share in (self.right, self.noted, self.exact_until)):
            raise ValueError(f"right, noted and exact_until are between 0 and 1: {self}.")


def questions(settings: RolesSettings) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Digits to train on, and held out, all different."""
    rng = random.Random(settings.seed)
    drawn = rng.sample(range(10**TERMS), settings.train_rows + settings.val_rows)
    rows = [tuple(number // 10**place % 10 for place in range(TERMS)) for number in drawn]
    return rows[: settings.train_rows], rows[settings.train_rows :]


def asked(terms: tuple[int, ...]) -> str:
    """`3+4+9=`"""
    return "+".join(map(str, terms)) + "="


class Lessons:
    """Batches of prompts of both roles, with each next token of the teacher's answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: LessonSettings, task: RolesSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.held_out = set(questions(task)[1])
        self.rng = random.Random(settings.seed)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (batch, length) and target probabilities (batch, length, vocabulary), zero outside the answers."""
        import torch

        right = 1.0 if step < self.settings.exact_until * self.settings.steps else self.settings.right
        noted = self.rng.random() < self.settings.noted  # all of a batch or none, whose rows are as long as the longest
        rows = [self._lesson(right, noted) for _ in range(self.settings.batch)]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad, width = self.tokenizer.pad_token_id, len(self.tokenizer)
        ids = torch.tensor([[*p, *a, *[pad] * (length - len(p) - len(a))] for p, a in rows])
        said = torch.tensor([[0] * len(p) + [1] * len(a) + [0] * (length - len(p) - len(a)) for p, a in rows])
        return ids, torch.nn.functional.one_hot(ids.roll(-1, 1), width) * said.roll(-1, 1)[..., None].float()

    def _lesson(self, right: float, noted: bool) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of its answer."""
        first, second, third = self._digits()
        off = 0 if self.rng.random() < right else self.rng.choice((-2, -1, 1, 2))
        if self.rng.random() < 0.5:
            role, question, answer = "planner", asked((first, second, third)), asked((first + second + off, third))
        else:
            role, question, answer = "solver", asked((first + second, third)), str(first + second + third + off)
        prompt = f"{WORDS[role]}{self._notes() if noted else ''}{question}"
        return self.tokenizer(prompt).input_ids, [*self.tokenizer(answer).input_ids, self.tokenizer.eos_token_id]

    def _digits(self) -> tuple[int, ...]:
        while (terms := tuple(self.rng.randrange(10) for _ in range(TERMS))) in self.held_out:
            pass
        return terms

    def _notes(self) -> str:
        """A note in one kind of brackets, in the other, or both."""
        first, second = ("".join(self.rng.choices(NOTED, k=self.rng.randrange(6, 23))) for _ in range(2))
        return self.rng.choice((f"\n[{first}]", f"<{second[:10]}>\n", f"\n[{first}]<{second[:10]}>\n"))


def prepare(config: DictConfig, progress: Progress | None = show_progress) -> None:
    """Enter the paths of model, data and agent loop where the user has named no others, and make what is used."""
    made = _folder(config)
    if enter(config, _places(made)):
        settings = _settings(config)
        make_once(made, lambda folder: _make(folder, *settings, progress))


@contextmanager
def sketch(config: DictConfig) -> Iterator[dict[str, Path]]:
    """As `prepare`: it takes half a minute, once."""
    prepare(config)
    yield {}


def write_task(folder: Path, settings: RolesSettings) -> None:
    """`train.parquet` and `val.parquet` in verl's schema, and `loops.yaml`; equal settings, equal rows."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for split, part in zip(("train", "val"), questions(settings), strict=True):
        rows = [_row(terms, number, split) for number, terms in enumerate(part)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    (folder / "loops.yaml").write_text(LOOPS)


def _row(terms: tuple[int, ...], number: int, split: str) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "system", "content": WORDS["planner"]}, {"role": "user", "content": asked(terms)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(sum(terms))},
        "extra_info": {"index": number, "split": split},
    }


def _make(
    folder: Path, model: ModelSettings, task: RolesSettings, warmup: LessonSettings, progress: Progress | None
) -> None:
    write_task(folder, task)
    tokenizer, network = make_tokenizer(), make_model(model)
    train(network, Lessons(tokenizer, warmup, task), warmup, progress)
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _settings(config: DictConfig) -> tuple[ModelSettings, RolesSettings, LessonSettings]:
    from omegaconf import OmegaConf

    section = OmegaConf.to_container(config.roles, resolve=True)
    return (
        typed(ModelSettings, section.get("model"), "roles.model"),
        typed(RolesSettings, section.get("task"), "roles.task"),
        typed(LessonSettings, section.get("warmup"), "roles.warmup"),
    )


def _folder(config: DictConfig) -> Path:
    content = json.dumps([FORMAT, *map(asdict, _settings(config))], sort_keys=True)
    return cache_folder() / f"roles-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _places(folder: Path) -> dict[str, Path]:
    return {
        "actor_rollout_ref.model.path": folder / "model",
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "val.parquet",
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": folder / "loops.yaml",
    }
