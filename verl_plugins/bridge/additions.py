"""Responses that `select_rows` adds become rows of the queue: the row they are like, with other tokens.

What belongs to the prompt is copied, or read from the dataset for a row of an earlier step. What has a value per token
of the response is made new, or refused where it cannot be known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_plugins.batch import Batch
from verl_plugins.bridge.rows import OFFSET, TRUNCATED, VERDICT
from verl_plugins.errors import DataError
from verl_plugins.fields import Addition
from verl_plugins.replay import StoredRow


def store_additions(
    meta: KVBatchMeta, batch: Batch, eos: int | None, dataset: Callable[[int], Mapping[str, Any]]
) -> KVBatchMeta:
    """Write what was added to `batch` into the queue; `meta` with these rows at its end.

    Args:
        meta: the rows of `batch`.
        batch: what a plugin added to.
        eos: the token that ends a response; one that has used up its budget without it was cut off.
        dataset: the row of a prompt.

    Raises:
        DataError: if rows have a field per token that an added response does not have.
    """
    tags = dict(zip(meta.keys, meta.tags, strict=True))
    likes = list(dict.fromkeys(addition.like for addition in batch.additions))
    stored = tq.kv_batch_get(keys=[batch.keys[row] for row in likes], partition_id=meta.partition_id)
    samples = {row: stored[place] for place, row in enumerate(likes)}
    rows = [_row(samples[addition.like], addition, batch, eos) for addition in batch.additions]
    past = [(row, addition.past) for row, addition in zip(rows, batch.additions, strict=True) if addition.past]
    prompts = {number: dataset(number) for number in {one.prompt_id for _, one in past}}
    for row, one in past:
        row |= _of_the_past(row, one, prompts[one.prompt_id])
    new_tags = [_tag(tags[batch.keys[addition.like]], addition) for addition in batch.additions]
    keys = [addition.key for addition in batch.additions]
    table = list_of_dict_to_tensordict(rows)
    tq.kv_batch_put(keys=keys, partition_id=meta.partition_id, fields=table, tags=new_tags)
    return KVBatchMeta(
        keys=meta.keys + keys,
        tags=meta.tags + new_tags,
        partition_id=meta.partition_id,
        fields=meta.fields,
        extra_info=meta.extra_info,
    )


def _row(sample: Any, addition: Addition, batch: Batch, eos: int | None) -> dict[str, Any]:
    like = {name: sample[name] for name in sample.keys()}  # noqa: SIM118  a TensorDict iterates over its batch
    row = {name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in like.items()}
    responses = torch.as_tensor(addition.response, dtype=like["responses"].dtype)
    question = like["prompts"][: len(like["prompts"]) - int(like[OFFSET])]
    context = question if addition.past is None else addition.past.context
    prompts = torch.as_tensor(context, dtype=question.dtype)
    input_ids = torch.cat([prompts, responses])
    mask = torch.ones_like(responses, dtype=like["response_mask"].dtype)
    rewards = torch.zeros(len(responses), dtype=like["rm_scores"].dtype)
    rewards[-1] = addition.reward
    own = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids), dtype=like["position_ids"].dtype),
        "rm_scores": rewards,
        VERDICT: torch.tensor(float(addition.correct)),
        OFFSET: torch.zeros_like(like[OFFSET]),
        TRUNCATED: (responses[-1] != eos) & (len(responses) >= batch.budgets[addition.like]),
        "extra_fields": _facts(row["extra_fields"], addition),
    }
    if addition.rollout_log_probs is not None and "rollout_log_probs" in like:
        own["rollout_log_probs"] = torch.as_tensor(addition.rollout_log_probs, dtype=like["rollout_log_probs"].dtype)
    for name, value in like.items():
        per_token = isinstance(value, Tensor) and value.dim() > 0
        if (per_token and name not in own) or (name == "multi_modal_inputs" and value):
            raise DataError(
                f"add: row {addition.key} needs the field {name!r}, whose values belong to the tokens of the response "
                f"it is like; a response can only be added where no such field is in the queue"
            )
    return row | own


def _of_the_past(row: Mapping[str, Any], past: StoredRow, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that are not those of a row of this step: of the dataset, of who the row is, and a method's own."""
    own = {name: value for name, value in prompt.items() if name in row and not isinstance(row[name], Tensor)}
    own |= {"uid": past.uid, OFFSET: torch.tensor(past.offset), TRUNCATED: torch.tensor(past.truncated)}
    own["extra_fields"] = {"reward_extra_info": row["extra_fields"]["reward_extra_info"]}
    for name, value in past.columns.items():
        if name not in row:
            raise DataError(f"bring_back: column {name!r} of a row of {past.uid} is not put for the rows of this step")
        own[name] = torch.tensor(value, dtype=row[name].dtype)
    return own


def _facts(extra_fields: dict[str, Any], addition: Addition) -> dict[str, Any]:
    """What the reward function said of the other response is not said of this one."""
    return {**extra_fields, "reward_extra_info": {"acc": float(addition.correct), "score": addition.reward}}


def _tag(tag: dict[str, Any], addition: Addition) -> dict[str, Any]:
    size, past = len(addition.response), addition.past
    if past is None:
        return {**tag, "response_len": size, "seq_len": tag["prompt_len"] + size}
    versions = dict.fromkeys(("min_global_steps", "max_global_steps"), past.step - 1)
    lengths = {"prompt_len": len(past.context), "response_len": size, "seq_len": len(past.context) + size}
    return {**tag, **lengths, **versions, "global_steps": past.step}
