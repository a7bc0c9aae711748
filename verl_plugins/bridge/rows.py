"""From agent-loop outputs to scored rows of the queue, many at a time.

verl scores and stores each session on its own; here sessions that end together share one message to a reward worker,
and groups that are ready together one to the queue. What is stored is verl's row plus the verdict, what was asked and
where the row stands in its response (a contract test compares the two).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_plugins.bridge.gather import Gather
from verl_plugins.bridge.loops import CUT_OFF
from verl_plugins.errors import DataError

VERDICT = "verdict"
"""Column with the reward function's `acc`, or the score where it gives none: `Batch.correct` reads it."""
TRUNCATED = "__truncated__"
"""Column with whether something cut the response off: `Batch.truncated` reads it."""
OFFSET = "__offset__"
"""Column with the tokens of the response that are in the row's context: `Batch.offsets` reads it."""
ROLLOUT_N, MAX_TOKENS = "__rollout_n__", "__max_tokens__"
"""verl's columns of a prompt's own group size and budget; here every row has them, as what was asked for it."""
PREFILL = "__prefill__"
"""The text `Prompt.prefill` puts behind a prompt; its tokens are in the prompts that are stored."""
USELESS = ("prompt", "dummy_tensor", "metrics", "tools_kwargs", "interaction_kwargs", "mm_processor_output")
USELESS += ("mm_processor_kwargs", PREFILL)
"""Columns the trainer never reads: each costs as much to store as a tensor."""


@dataclass
class Row:
    """One row on its way into the queue."""

    key: str
    fields: dict[str, Any]
    tag: dict[str, Any]


def session_rows(worker: Any, outputs: Sequence[Any], columns: dict[str, Any]) -> list[Row]:
    """The rows of one scored session: one per output, the reward of the last on all of them."""
    last = outputs[-1]
    rows = []
    for turn, output in enumerate(outputs):
        if output is not last and last.reward_score is not None:
            output.reward_score = last.reward_score
            output.extra_fields["reward_extra_info"] = last.extra_fields["reward_extra_info"]
        rows.append(_row(worker, output, columns, turn))
    return rows


def _row(worker: Any, output: Any, columns: dict[str, Any], turn: int) -> Row:
    fields = {**output.as_dict(), **columns}
    fields.pop("multi_modal_data", None)
    input_ids = torch.cat([fields["prompts"], fields["responses"]])
    if output.reward_score is not None:
        verdict = output.extra_fields.get("reward_extra_info", {}).get("acc", output.reward_score)
        fields[VERDICT] = torch.tensor(float(verdict))
    fields[TRUNCATED] = torch.tensor(bool(fields["extra_fields"].pop(CUT_OFF)))
    fields[OFFSET] = torch.tensor(int(fields["extra_fields"].pop(OFFSET, 0)))
    for name in (ROLLOUT_N, MAX_TOKENS):
        fields[name] = torch.tensor(int(fields[name]))
    for name in USELESS:
        fields.pop(name, None)
    fields["loss_mask"] = fields["response_mask"]
    fields["input_ids"] = input_ids
    fields["multi_modal_inputs"] = worker._compute_multi_modal_inputs(output, input_ids)
    fields["position_ids"] = _position_ids(worker, input_ids, fields["multi_modal_inputs"])
    prompt_length, response_length = len(fields["prompts"]), len(fields["responses"])
    tag = {
        "status": "success",
        "prompt_len": prompt_length,
        "response_len": response_length,
        "seq_len": prompt_length + response_length,
        "global_steps": columns["global_steps"],
        "min_global_steps": fields["extra_fields"].get("min_global_steps"),
        "max_global_steps": fields["extra_fields"].get("max_global_steps"),
    }
    return Row(f"{columns['uid']}_{columns['session_id']}_{turn}", fields, tag)


def _position_ids(worker: Any, input_ids: torch.Tensor, multi_modal_inputs: dict) -> torch.Tensor:
    if worker.processor is None:
        return torch.arange(len(input_ids))
    mask = torch.ones_like(input_ids)[None]
    return worker._compute_position_ids(input_ids[None], mask, multi_modal_inputs).squeeze(0)


class RewardBatcher:
    """Scores single-output sessions through verl's reward workers, those that end together in one message."""

    def __init__(self, reward_workers: Sequence[Any] | None) -> None:
        self._workers = reward_workers
        self._gather = Gather(self._send)

    def takes(self, outputs: Sequence[Any]) -> bool:
        """Whether this session can be scored here (verl does the others)."""
        return self._workers is not None and len(outputs) == 1 and outputs[0].reward_score is None

    async def score(self, output: Any, columns: dict[str, Any]) -> None:
        """Set the output's reward and what the reward function said of it."""
        started = time.perf_counter()
        result = await self._gather((output, columns))
        output.reward_score = _score(result["reward_score"])
        output.extra_fields["reward_extra_info"] = result["reward_extra_info"]
        output.metrics.compute_score = time.perf_counter() - started

    async def _send(self, sessions: list[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Each worker gets a share."""
        size = -(-len(sessions) // len(self._workers))
        parts = [sessions[start : start + size] for start in range(0, len(sessions), size)]
        workers = random.sample(self._workers, len(parts))
        answers = await asyncio.gather(*[self._ask(*pair) for pair in zip(workers, parts, strict=True)])
        return [one for part, answer in zip(parts, answers, strict=True) for one in await self._each(part, answer)]

    async def _ask(self, worker: Any, part: list[tuple[Any, dict[str, Any]]]) -> Any:
        """What it raises is its result, one for all of them."""
        try:
            answers = await worker.compute_score_batch.remote(_reward_input(*zip(*part, strict=True)))
            if len(answers) != len(part):
                raise RuntimeError(f"the reward worker gave {len(answers)} answers for {len(part)} responses")
            return answers
        except BaseException as error:
            return error

    async def _each(self, part: list[tuple[Any, dict[str, Any]]], answer: Any) -> list[Any]:
        """A result per session; where a message failed, each of its sessions is asked for by itself."""
        if not isinstance(answer, BaseException):
            return answer
        if len(part) == 1:
            return [answer]
        return [one for session in part for one in await self._send([session])]


def _score(score: Any) -> float:
    """What the reward function gave, if it is a finite number."""
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(score, str) and math.isfinite(score):
            return float(score)
    raise DataError(f"the reward function gave the score {score!r:.80}, expected a finite number")


class Publisher:
    """Writes the rows of groups that are ready together to the queue at once, then their prompts' status.

    Rows that can meet in a batch have the same columns: those of a step where `by_step`, else those of the whole run.
    """

    def __init__(self, by_step: bool = True) -> None:
        self._gather = Gather(self._send)
        self._by_step = by_step
        self._columns: dict[str, tuple[int, set[str]]] = {}
        """Step and columns of the last rows of each partition."""

    async def publish(self, partition: str, rows: Sequence[Row], uid: str, status: str) -> None:
        """Store a group and mark its prompt."""
        await self._gather((partition, rows, uid, status))

    async def _send(self, groups: list[tuple[str, Sequence[Row], str, str]]) -> list[BaseException | None]:
        """What cannot be stored with the others is tried by itself, and its error is its own."""
        try:
            await self._put(groups)
            return [None] * len(groups)
        except BaseException as error:
            if len(groups) == 1:
                return [error]
        return [(await self._send([group]))[0] for group in groups]

    async def _put(self, groups: list[tuple[str, Sequence[Row], str, str]]) -> None:
        for partition in sorted({group[0] for group in groups}):
            ours = [group for group in groups if group[0] == partition]
            rows = [row for _, group_rows, _, _ in ours for row in group_rows]
            self._complete(partition, rows)
            if rows:
                await tq.async_kv_batch_put(
                    keys=[row.key for row in rows],
                    fields=list_of_dict_to_tensordict([row.fields for row in rows]),
                    tags=[row.tag for row in rows],
                    partition_id=partition,
                )
            tags = [{"status": status} for _, _, _, status in ours]
            await tq.async_kv_batch_put(keys=[uid for _, _, uid, _ in ours], partition_id=partition, tags=tags)

    def _complete(self, partition: str, rows: Sequence[Row]) -> None:
        """One set of columns for all rows: the driver asks for a column of all of them, or of none."""
        if not rows:
            return
        step = rows[0].tag["global_steps"] if self._by_step else 0
        before, known = self._columns.get(partition, (step, set()))
        if before != step or not known:
            known = {name for row in rows for name in row.fields}
        for row in rows:
            if "rollout_log_probs" in known - row.fields.keys():  # a tool loop leaves them out for an empty response
                row.fields["rollout_log_probs"] = torch.zeros(len(row.fields["responses"]))
            if differ := sorted(known ^ row.fields.keys()):
                word = "lacks" if known - row.fields.keys() else "has"
                raise DataError(f"row {row.key} {word} {', '.join(differ)}, unlike the rows before it")
        self._columns[partition] = step, known


def _reward_input(outputs: Sequence[Any], columns: Sequence[dict[str, Any]]) -> DataProto:
    """What verl's reward managers read: prompts padded on the left, responses on the right, and the rows' columns."""
    prompts = [torch.tensor(output.prompt_ids) for output in outputs]
    responses = [torch.tensor(output.response_ids) for output in outputs]
    prompt_mask, response_mask = [[torch.ones_like(ids) for ids in rows] for rows in (prompts, responses)]
    left, right = {"batch_first": True, "padding_side": "left"}, {"batch_first": True}
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"prompts": pad(prompts, **left), "responses": pad(responses, **right)}
    batch["input_ids"] = torch.cat([batch["prompts"], batch["responses"]], dim=1)
    batch["attention_mask"] = torch.cat([pad(prompt_mask, **left), pad(response_mask, **right)], dim=1)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # Copies, because verl's reward managers write into `extra_info`, which the sessions of a group share.
    names = dict.fromkeys(name for row in columns for name in row)
    objects = {name: _objects([copy.copy(row.get(name)) for row in columns]) for name in names}
    objects["__num_turns__"] = np.array([output.num_turns for output in outputs])
    objects["tool_extra_fields"] = _objects([output.extra_fields for output in outputs])
    objects["prompt_len"] = np.array([len(ids) for ids in prompts])
    objects["response_len"] = np.array([len(ids) for ids in responses])
    return DataProto(batch=TensorDict(batch, batch_size=len(outputs)), non_tensor_batch=objects)


def _objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
