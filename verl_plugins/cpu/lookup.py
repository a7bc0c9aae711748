"""What the preset `lookup` needs: sums with letters in them, and a tiny model that sometimes asks for their digits.

`3+a+c=` cannot be answered from the prompt: each row has digits of its own for its letters, and only the tool
(`lookup_tool.py`) knows them. The policy writes `?a`, the tool answers `7`, and so on, then comes the sum. The warm-up
teaches all of that, and then a teacher that asks only now and then and guesses otherwise: what reinforcement learning
can find is that asking pays.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_plugins.composition.cache import cache_folder, make_once
from verl_plugins.composition.settings import typed
from verl_plugins.cpu.model import ModelSettings, make_model, make_tokenizer
from verl_plugins.cpu.preset import enter
from verl_plugins.cpu.warmup import Progress, show_progress, train

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

DATA_SOURCE, TOOL, ASKING = "verl_plugins/lookup", "lookup", "?"
LETTERS = "abcdefghij"
BETWEEN = "\n"
"""verl puts it behind each turn of the policy's when the conversation goes on."""
FORMAT = 1
"""Part of the cache key: raise it when the code here changes what is written."""
TERMS = 3
TOOLS = f"""tools:
  - class_name: verl_plugins.cpu.lookup_tool.Lookup
    config: {{type: native}}
    tool_schema:
      type: function
      function:
        name: {TOOL}
        description: The digit that a letter stands for
        parameters:
          type: object
          properties: {{letter: {{type: string, description: One letter of the question}}}}
          required: [letter]
"""


@dataclass(frozen=True)
class LookupSettings:
    """The task.

    Raises:
        ValueError: if a setting is out of range.
    """

    train_rows: int = 512
    val_rows: int = 128
    letters: int = 2
    """At most so many of the three digits are letters; rows have 0 to so many, evenly."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.letters <= TERMS and self.train_rows >= 1 and self.val_rows >= 1):
            raise ValueError(f"Out of range (letters 1 to {TERMS}, at least one row each): {self}.")


@dataclass(frozen=True)
class LessonSettings:
    """The warm-up: for `exact_until` (a fraction) of its steps the teacher always asks, afterwards with `asks`.

    Raises:
        ValueError: if a setting is out of range.
    """

    steps: int = 600
    batch: int = 64
    lr: float = 2e-3
    asks: float = 0.5
    exact_until: float = 0.6
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.threads) < 1 or self.lr <= 0:
            raise ValueError(f"steps, batch, threads and lr must be positive: {self}.")
        if not (0 <= self.asks <= 1 and 0 <= self.exact_until <= 1):
            raise ValueError(f"asks and exact_until are between 0 and 1: {self}.")


class Question(NamedTuple):
    """A prompt, the digits its letters stand for in the order they are read, and its answer."""

    prompt: str
    digits: dict[str, int]
    answer: int


def draw(rng: random.Random, letters: int) -> Question:
    """A question with so many letters."""
    terms = [rng.randrange(10) for _ in range(TERMS)]
    places = sorted(rng.sample(range(TERMS), letters))
    digits = {letter: terms[place] for letter, place in zip(rng.sample(LETTERS, letters), places, strict=True)}
    shown = [str(term) for term in terms]
    for letter, place in zip(digits, places, strict=True):
        shown[place] = letter
    return Question("+".join(shown) + "=", digits, sum(terms))


def questions(settings: LookupSettings) -> tuple[list[Question], list[Question]]:
    """For training, and held out; no question is asked twice with the same digits."""
    rng = random.Random(settings.seed)
    found: dict[tuple[str, tuple[int, ...]], Question] = {}
    while len(found) < settings.train_rows + settings.val_rows:
        question = draw(rng, len(found) % (settings.letters + 1))
        found.setdefault((question.prompt, tuple(question.digits.values())), question)
    drawn = list(found.values())
    rng.shuffle(drawn)
    return drawn[: settings.train_rows], drawn[settings.train_rows :]


def reply(digit: int) -> str:
    """What the tool says, a line: what stands in the last line is the answer."""
    return f"{digit}\n"


class Lessons:
    """Batches of conversations, the tool's words in them, with each next token of the policy's."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: LessonSettings, held_out: Sequence[Question], letters: int
    ) -> None:
        self.tokenizer, self.settings, self.letters = tokenizer, settings, letters
        self.held_out = {question.prompt for question in held_out if question.digits == {}}
        self.rng = random.Random(settings.seed)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (batch, length) and target probabilities (batch, length, vocabulary), zero outside the answers."""
        import torch

        asks = 1.0 if step < self.settings.exact_until * self.settings.steps else self.settings.asks
        rows = [self._conversation(asks) for _ in range(self.settings.batch)]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [self.tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows])
        said = torch.tensor([said + [0] * (length - len(said)) for _, said in rows])
        targets = torch.nn.functional.one_hot(ids.roll(-1, 1), len(self.tokenizer)).float()
        return ids, targets * said.roll(-1, 1)[..., None]

    def _conversation(self, asks: float) -> tuple[list[int], list[int]]:
        """Tokens of one, and which of them are the policy's."""
        question = draw(self.rng, self.rng.randrange(self.letters + 1))
        while question.prompt in self.held_out:
            question = draw(self.rng, 0)
        ids = self.tokenizer(question.prompt).input_ids
        said, answer = [0] * len(ids), question.answer
        for letter, digit in question.digits.items():
            if self.rng.random() >= asks:
                answer += self.rng.randrange(10) - digit  # a guess
                break
            self._say(ids, said, f"{ASKING}{letter}", True)
            self._say(ids, said, BETWEEN + reply(digit), False)
        self._say(ids, said, str(answer), True)
        return ids, said

    def _say(self, ids: list[int], said: list[int], text: str, policy: bool) -> None:
        new = self.tokenizer(text).input_ids + [self.tokenizer.eos_token_id] * policy
        ids += new
        said += [int(policy)] * len(new)


def prepare(config: DictConfig, progress: Progress | None = show_progress) -> None:
    """Enter the paths of model, data and tool where the user has named no others, and make what is used."""
    made = _folder(config)
    if enter(config, _places(made)):
        settings = _settings(config)
        make_once(made, lambda folder: _make(folder, *settings, progress))


@contextmanager
def sketch(config: DictConfig) -> Iterator[dict[str, Path]]:
    """As `prepare`: it takes half a minute, once."""
    prepare(config)
    yield {}


def write_task(folder: Path, settings: LookupSettings) -> None:
    """`train.parquet` and `val.parquet` in verl's schema, and `tools.yaml`; equal settings, equal rows."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for split, part in zip(("train", "val"), questions(settings), strict=True):
        rows = [_row(question, number, split) for number, question in enumerate(part)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    (folder / "tools.yaml").write_text(TOOLS)


def _row(question: Question, number: int, split: str) -> dict[str, Any]:
    digits = ",".join(f"{letter}={digit}" for letter, digit in question.digits.items())
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": question.prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(question.answer)},
        "extra_info": {
            "index": number,
            "split": split,
            "level": len(question.digits),
            "need_tools_kwargs": True,
            "tools_kwargs": {TOOL: {"create_kwargs": {"digits": digits}}},
        },
    }


def _make(
    folder: Path, model: ModelSettings, task: LookupSettings, warmup: LessonSettings, progress: Progress | None
) -> None:
    write_task(folder, task)
    tokenizer, network = make_tokenizer(), make_model(model)
    train(network, Lessons(tokenizer, warmup, questions(task)[1], task.letters), warmup, progress)
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _settings(config: DictConfig) -> tuple[ModelSettings, LookupSettings, LessonSettings]:
    from omegaconf import OmegaConf

    section = OmegaConf.to_container(config.lookup, resolve=True)
    return (
        typed(ModelSettings, section.get("model"), "lookup.model"),
        typed(LookupSettings, section.get("task"), "lookup.task"),
        typed(LessonSettings, section.get("warmup"), "lookup.warmup"),
    )


def _folder(config: DictConfig) -> Path:
    content = json.dumps([FORMAT, *map(asdict, _settings(config))], sort_keys=True)
    return cache_folder() / f"lookup-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _places(folder: Path) -> dict[str, Path]:
    return {
        "actor_rollout_ref.model.path": folder / "model",
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "val.parquet",
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": folder / "tools.yaml",
    }
