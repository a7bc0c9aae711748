"""Which prompts are rolled out next: the part of the trainer behind `select_prompts` and the two `prepare_…`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.utils import create_rl_sampler
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from verl_plugins.bridge.queue import prompt_uid
from verl_plugins.bridge.run import RowsOfDataset
from verl_plugins.errors import DataError
from verl_plugins.services import Prompt, Prompts

MOST_DRAWN = 3
"""Batches drawn within one step after which it is asked whether any prompt comes through."""


class DrawsPrompts:
    """Mixed into one of verl's trainers; expects `plugins`, `run` and `clock`."""

    _draws = (0, 0)
    """The step of the latest draw, and how many were drawn in it before."""

    def _init_dataloader(self) -> None:
        """verl's dataset and order of rows, but the loader yields prompt ids: the rows are read when drawn."""
        try:
            with self._without_validation():
                super()._init_dataloader()
        finally:
            self._refuse_too_few_rows()
        self.rows = RowsOfDataset(self.train_dataset)
        self.train_dataloader = StatefulDataLoader(
            dataset=range(len(self.train_dataset)),
            batch_size=self.config.data.get("gen_batch_size", None) or self.config.data.train_batch_size,
            drop_last=True,
            collate_fn=list,
            sampler=create_rl_sampler(self.config.data, self.train_dataset),
        )
        if self.plugins.implements("prepare_validation"):
            edit = lambda prompts: self.plugins.hook.prepare_validation(run=self.run, prompts=prompts)  # noqa: E731
            self.val_dataloader = _Prepared(self.val_dataloader, edit)

    @contextmanager
    def _without_validation(self) -> Iterator[None]:
        """Inside, verl makes a dataset of validation prompts that is never read where there are no files for one."""
        if self.config.data.get("val_files"):
            yield
            return
        original = trainer_base.create_rl_dataset
        unread = lambda files, *args, **kwargs: original(files, *args, **kwargs) if files else range(1)  # noqa: E731
        with patch.object(trainer_base, "create_rl_dataset", unread):
            yield

    def _refuse_too_few_rows(self) -> None:
        """Say which data is missing; verl divides by zero or fails in a sampler."""
        data = self.config.data
        for key, least in (("train", data.train_batch_size), ("val", 1)):
            dataset = getattr(self, f"{key}_dataset", None)
            if dataset is not None and len(dataset) < least:
                need = "data.train_batch_size needs" if key == "train" else "validation needs"
                sentence = f"data.{key}_files gives {len(dataset)} rows, {need} {least}"
                if data.filter_overlong_prompts:
                    sentence += (
                        "; data.filter_overlong_prompts leaves out prompts of more than data.max_prompt_length "
                        f"({data.max_prompt_length}) tokens"
                    )
                raise DataError(sentence)

    def _next_train_batch(self, num_prompts: int | None = None) -> Any:
        """The rows to roll out next: chosen, read, numbered and edited."""
        count = num_prompts or self.config.data.train_batch_size
        step, drawn = self._draws
        if step == self.global_steps and drawn >= MOST_DRAWN * self.config.data.train_batch_size:
            self.refuse_to_draw_for_ever()
        with self.clock():
            chosen = self._select(count)
        prompts = Prompts([Prompt(prompt_id, self.rows[prompt_id]) for prompt_id in chosen])
        with self.clock():
            self.plugins.hook.prepare_prompts(run=self.run, prompts=prompts)
        for prompt in prompts:
            prompt.row["uid"] = self._next_uid(prompt.id)
        batch = tu.get_tensordict(_collate(prompts))
        tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        return batch

    def _select(self, count: int) -> Sequence[int]:
        chosen = self.plugins.hook.select_prompts(run=self.run, count=count)
        if chosen is None:
            return self._next_in_order(count)
        return [int(prompt_id) for prompt_id in chosen]

    def _next_in_order(self, count: int) -> list[int]:
        """verl's shuffled pass over the dataset, epoch after epoch."""
        chosen: list[int] = []
        while len(chosen) < count:
            if self.train_dataloader_it is None:
                self.train_dataloader_it = iter(self.train_dataloader)
            chunk = next(self.train_dataloader_it, None)
            if chunk is None:
                self.train_dataloader_it = None
                continue
            chosen += [int(prompt_id) for prompt_id in chunk]
        if len(chosen) != count:
            raise DataError(f"{count} prompts asked, but data.gen_batch_size draws them in pieces that do not add up")
        return chosen

    def _next_uid(self, prompt_id: int) -> str:
        step, drawn = self._draws
        self._draws = (self.global_steps, drawn + 1 if step == self.global_steps else 0)
        return prompt_uid(prompt_id, *self._draws)


class _Prepared:
    """verl's loader of validation prompts, each batch edited before verl sees it."""

    def __init__(self, loader: Iterable[dict[str, Any]], edit: Callable[[Prompts], None]) -> None:
        self._loader, self._edit = loader, edit

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count = 0
        for columns in self._loader:
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            prompts = [Prompt(count + place, row) for place, row in enumerate(rows)]
            count += len(prompts)
            self._edit(Prompts(prompts))
            yield _collate(prompts)


def _collate(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The prompts' columns as verl's loader gives them."""
    return dict(collate_fn([prompt.row for prompt in prompts]))
