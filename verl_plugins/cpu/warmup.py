"""Supervised warm-up of the tiny model with a noisy teacher, and the cache that makes it a matter of one run.

Reinforcement learning sharpens what a model can already do. So the model first learns to add, from a teacher that is
right, and then to be unsure, from a teacher whose accuracy falls with the level: prompts differ in difficulty from the
start, and most right answers have some probability that reinforcement learning can raise.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_plugins.composition.cache import make_once
from verl_plugins.composition.identity import identify
from verl_plugins.cpu.model import ModelSettings, make_config, make_model, make_tokenizer
from verl_plugins.cpu.task import TaskSettings, all_sums, split_sums, write_task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from verl_plugins.composition.manager import Plugins

# Part of the cache key: raise it when the code here, in model.py or in task.py changes what is written.
FORMAT = 2

# Wraps the steps of the warm-up and yields each of them once, as rich.progress.track does.
Progress = Callable[[Sequence[int]], Iterable[int]]

# An answer (its tokens, the end token included) and its probability.
Answers = dict[tuple[int, ...], float]


@dataclass(frozen=True)
class WarmupSettings:
    """The supervised phase.

    ``teacher_accuracy[level]`` is how often the teacher is right in the end; else it is off by 1 to ``off_by``, either
    way. For the first ``exact_until`` (a fraction) of the steps it is always right; at ``noisy_from`` its accuracy has
    fallen, linearly, to that. ``threads`` is fixed because the weights depend on it in the last bits.

    Raises:
        ValueError: if a setting is out of range.
    """

    steps: int = 420
    batch: int = 64
    lr: float = 2e-3
    teacher_accuracy: tuple[float, ...] = (0.98, 0.5, 0.1, 0.01)
    off_by: int = 8
    exact_until: float = 0.25
    noisy_from: float = 0.5
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.off_by, self.threads) < 1 or self.lr <= 0:
            raise ValueError(f"steps, batch, off_by, threads and lr must be positive: {self}.")
        if not (0 <= self.exact_until < self.noisy_from <= 1 and all(0 <= p <= 1 for p in self.teacher_accuracy)):
            raise ValueError(f"Accuracies and fractions must be in 0 to 1, exact_until before noisy_from: {self}.")


@dataclass(frozen=True)
class Prepared:
    """A warmed-up model (a Hugging Face folder, tokenizer included) and its task (parquet files in verl's schema)."""

    model_path: Path
    train_file: Path
    val_file: Path


def show_progress(steps: Sequence[int]) -> Iterable[int]:
    """Yield the steps while a bar on stderr counts them."""
    from rich.console import Console
    from rich.progress import track

    return track(steps, description="Warming up the tiny model (first run only)", console=Console(stderr=True))


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: WarmupSettings,
    task: TaskSettings,
    progress: Progress | None = None,
) -> None:
    """Train ``model`` in place on the teacher's answers to random prompts that are not held out.

    It draws from a generator of its own and puts torch's thread count back. ``progress`` None is silent.

    Raises:
        ValueError: if there is not one teacher accuracy for each level of the task, or no prompt is left to learn from.
    """
    train(model, _Lessons(tokenizer, settings, task), settings, progress)


def train(model: PreTrainedModel, lessons: Any, settings: Any, progress: Progress | None = None) -> None:
    """Train `model` in place on what `lessons.batch(step)` gives: token ids and target probabilities.

    `settings` has `steps`, `lr` and `threads`; torch's thread count is put back.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    steps = range(settings.steps)
    with _threads(settings.threads):
        for step in steps if progress is None else progress(steps):
            ids, targets = lessons.batch(step)
            # Padding is on the right, so that causal attention needs no mask.
            log_probs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            loss = -(targets * log_probs).sum() / targets.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def prepare(
    cache_dir: Path,
    model: ModelSettings,
    task: TaskSettings,
    warmup: WarmupSettings,
    progress: Progress | None = show_progress,
    shaping: Plugins | None = None,
) -> Prepared:
    """The warmed-up model and its task from the cache, made first if they are not there or damaged.

    `shaping` are plugins that shape logits: the model learns to speak through them, as it does in the run.

    Raises:
        RunError: the folder is not in the cache, and the cache cannot be written.
    """
    prepared = locate(cache_dir, model, task, warmup, shaping)
    make_once(prepared.model_path.parent, lambda folder: _make(folder, model, task, warmup, progress, shaping))
    return prepared


def locate(
    cache_dir: Path, model: ModelSettings, task: TaskSettings, warmup: WarmupSettings, shaping: Plugins | None = None
) -> Prepared:
    """Where the cache has them, or will have."""
    return _inside(Path(cache_dir) / _key(model, task, warmup, shaping=shaping))


def sketch(folder: Path, model: ModelSettings, task: TaskSettings) -> Prepared:
    """The task, and the model's configuration and tokenizer without weights, in `folder`."""
    made = _inside(folder)
    write_task(folder, task)
    make_config(model).save_pretrained(made.model_path)
    make_tokenizer().save_pretrained(made.model_path)
    return made


def _inside(folder: Path) -> Prepared:
    return Prepared(folder / "model", folder / "train.parquet", folder / "val.parquet")


def _key(*settings: ModelSettings | TaskSettings | WarmupSettings, shaping: Plugins | None = None) -> str:
    """Name of the cache folder: a hash of everything that decides its content, with code and settings of plugins."""
    decides: list[Any] = [FORMAT, *map(asdict, settings)]
    if shaping:
        digests = identify([plugin.name for plugin in shaping], "warm-up").digests
        decides += [[plugin.name, digests[plugin.name], asdict(plugin.config)] for plugin in shaping]
    content = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _make(
    folder: Path,
    model: ModelSettings,
    task: TaskSettings,
    warmup: WarmupSettings,
    progress: Progress | None,
    shaping: Plugins | None,
) -> None:
    """Write the task and the warmed-up model into ``folder``."""
    write_task(folder, task)
    tokenizer, network = make_tokenizer(), make_model(model)
    if shaping is not None:
        from verl_plugins.bridge.logits import shape

        shape(shaping, network)
    warm_up(network, tokenizer, warmup, task, progress)
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Fix torch's threads: another number of them adds in another order and gives other weights."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Lessons:
    """Batches of prompts with the teacher's next-token probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: WarmupSettings, task: TaskSettings) -> None:
        given = len(settings.teacher_accuracy)
        if given != task.levels:
            raise ValueError(f"{given} teacher accuracies were given for {task.levels} levels.")
        held_out = set(split_sums(task)[1])
        self.sums = [item for item in all_sums(task) if item not in held_out]
        if not self.sums:
            raise ValueError("Every prompt is held out: none is left for the warm-up.")
        self.settings = settings
        self.rng = random.Random(settings.seed)
        self.pad, self.width = tokenizer.pad_token_id, len(tokenizer)
        self.prompts = {item.prompt: tokenizer(item.prompt).input_ids for item in self.sums}
        highest = 9 * task.terms + settings.off_by
        self.numbers = [(*tokenizer(str(number)).input_ids, tokenizer.eos_token_id) for number in range(highest + 1)]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (batch, length) and target probabilities (batch, length, vocabulary), zero outside the answers.

        A target is the teacher's whole distribution, given the answer so far, and not one draw: far less noise.
        """
        import torch

        rows: list[list[int]] = []
        cells: list[tuple[int, int, int]] = []
        values: list[float] = []
        for row, item in enumerate(self.rng.choices(self.sums, k=self.settings.batch)):
            answers = self._answers(item.answer, self._accuracy(item.level, step))
            (answer,) = self.rng.choices(list(answers), list(answers.values()))
            prompt = self.prompts[item.prompt]
            rows.append([*prompt, *answer])
            for place in range(len(answer)):
                for token, probability in _next_tokens(answers, answer[:place]).items():
                    cells.append((row, len(prompt) + place - 1, token))
                    values.append(probability)
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        targets = torch.zeros(*ids.shape, self.width)
        targets[tuple(torch.tensor(cells).T)] = torch.tensor(values)
        return ids, targets

    def _accuracy(self, level: int, step: int) -> float:
        """How often the teacher is right about ``level`` at this step."""
        start, end = self.settings.exact_until, self.settings.noisy_from
        noise = min(1.0, max(0.0, (step / self.settings.steps - start) / (end - start)))
        return 1.0 - noise * (1.0 - self.settings.teacher_accuracy[level])

    def _answers(self, right: int, accuracy: float) -> Answers:
        """The teacher's answers; none is negative."""
        reach = self.settings.off_by
        wrong = [number for number in range(max(0, right - reach), right + reach + 1) if number != right]
        answers = {self.numbers[number]: (1.0 - accuracy) / len(wrong) for number in wrong}
        answers[self.numbers[right]] = accuracy
        return answers


def _next_tokens(answers: Answers, prefix: tuple[int, ...]) -> dict[int, float]:
    """Probability of each token after ``prefix``, which has some probability itself."""
    weights: dict[int, float] = {}
    for tokens, probability in answers.items():
        if tokens[: len(prefix)] == prefix:
            token = tokens[len(prefix)]
            weights[token] = weights.get(token, 0.0) + probability
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}
