"""`actor.logits`: what the policy's softmax sees at some response tokens of the mini-batch, at any parameters.

And `actor.distillation_gradient`, a pass of its own.

The engine's own forward pass makes them, with its padding, precision and micro-batches; its step from logits to
log-probs is where they are taken out. Parameters that were moved are put back, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import FSDPModule, fsdp_version

from verl_plugins.bridge.moving import moved
from verl_plugins.cpu.engine import KEPT

PROBED = "verl_plugins_probed"
"""Of each token of `input_ids`: whether its logits are asked for."""
GOLDEN = 0.6180339887498949
"""Rows in the order of the fractional parts of its multiples: any first few of them are spread over the batch."""


def trained(module: torch.nn.Module) -> list[Tensor]:
    """This rank's parts of the parameters that are trained; to write into one changes the model."""
    parts = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
    return [_local(part) for part in parts]


@torch.no_grad()
def logits(engine: Any, data: TensorDict, tokens: int, at: Iterable[Tensor] | None = None) -> Tensor:
    """[n,V] logits over the temperature; a collective call.

    Args:
        engine: verl's FSDP engine.
        data: the mini-batch of this rank.
        tokens: as many response tokens of all ranks together, each having its share.
        at: values for `trained(engine.module)`, consumed one by one as they are put in place.
    """
    group = engine.get_data_parallel_group()
    share = -(-tokens // torch.distributed.get_world_size(group))
    part, found = _chosen(data, share, group), []

    def catch(output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any) -> dict:
        found.append(_predicting(engine, output.logits, output_args, micro_batch))
        return {}

    replaced = patch.object(engine, "prepare_model_outputs", catch)
    with moved(trained(engine.module), at), _evaluating(engine.module), replaced:
        engine.infer_batch(part, loss_function=None)
    return torch.cat(found)


def gradient(engine: Any, data: TensorDict, loss: Any, mode: AbstractContextManager[None]) -> list[Tensor]:
    """This rank's parts of a gradient of its own, one for each of `trained`; a collective call.

    Another forward and backward pass over the mini-batch makes it, under `mode`; the gradients that are there stay.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        with mode, torch.enable_grad():
            engine.forward_backward_batch(data, loss)
        made = [parameter.grad for parameter in parameters]
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
    nothing = zip(made, trained(engine.module), strict=True)
    return [torch.zeros_like(part) if grad is None else _local(grad) for grad, part in nothing]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(values: Tensor) -> Tensor:
    """[any] this rank's values -> those of all ranks; a collective call, and any rank may have none."""
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return values
    everyone: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everyone, values.cpu())
    return torch.cat(everyone).to(values.device)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Without dropout; afterwards no gathered parameters are left, which FSDP would take for the current ones."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        if fsdp_version(module) == 1 and module._handle is not None:
            module._handle.reshard(True)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        module.train(training)


def _chosen(data: TensorDict, tokens: int, group: Any) -> TensorDict:
    """Rows of the mini-batch with `tokens` response tokens marked; as many rows on every rank, at least one."""
    mask = _trained_on(data)
    seen = torch.nn.functional.pad(mask.values().long().cumsum(0), (1, 0))
    counts = seen[mask.offsets()].diff()
    order = (torch.arange(len(data)) * GOLDEN).frac().argsort().to(counts.device)
    needed = torch.tensor([int((counts[order].cumsum(0) < tokens).sum()) + 1], device=get_device_id())
    torch.distributed.all_reduce(needed, torch.distributed.ReduceOp.MAX, group=group)
    size = 1
    if not tu.get_non_tensor_data(data, "use_dynamic_bsz", default=True):
        size = tu.get_non_tensor_data(data, "micro_batch_size_per_gpu", default=1)
    rows = order[: min(-(-int(needed) // size) * size, len(data))].sort().values
    part = tu.index_select_tensor_dict(data, rows.cpu())
    part[PROBED] = _marked(part, tokens)
    return part


def _trained_on(data: TensorDict) -> Tensor:
    """Jagged like the responses: the tokens of the loss."""
    return data["loss_mask"] if "loss_mask" in data else data["response_mask"]


def _marked(data: TensorDict, tokens: int) -> Tensor:
    """Jagged like `input_ids`: True where a response token is predicted, at most `tokens` times, evenly spread."""
    mask = _trained_on(data)
    whole, responses = data["input_ids"].offsets(), mask.offsets()
    lengths = responses.diff()
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    place = torch.arange(len(row), device=row.device) - responses[row]
    # A token is predicted by the one before it, and a response ends where its row does.
    predicting = whole[row + 1] - lengths[row] + place - 1
    predicting = predicting[mask.values().bool()]
    count = len(predicting)
    if count > tokens:
        number = torch.arange(count, device=row.device)
        predicting = predicting[(number + 1) * tokens // count > number * tokens // count]
    marks = torch.zeros(int(whole[-1]), dtype=torch.bool, device=row.device)
    marks[predicting] = True
    return torch.nested.nested_tensor_from_jagged(marks, offsets=whole)


def _predicting(engine: Any, logits: Tensor, output_args: dict[str, Any], micro_batch: TensorDict) -> Tensor:
    """The marked tokens' logits of one forward pass over the temperature, in single precision at least."""
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    marks = micro_batch[PROBED]
    if "temperature_rmpad" in output_args:
        logits, temperature = logits.squeeze(0), output_args["temperature_rmpad"]
        length, ranks = len(logits), engine.ulysses_sequence_parallel_size
        rank = torch.distributed.get_rank(engine.ulysses_parallel_group) if ranks > 1 else 0
        padded = torch.nn.functional.pad(marks.values(), (0, length * ranks - len(marks.values())))
        here = padded[rank * length : (rank + 1) * length]
    else:
        width = int(micro_batch["input_ids"].offsets().diff().max())
        here = marks.to_padded_tensor(False, output_size=(len(logits), width))
        here = here[:, output_args[KEPT]] if KEPT in output_args else here
        temperature = output_args["temperature"][:, None].expand_as(here)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[here].to(wide) / temperature[here].clamp(min=1e-8).to(wide)[:, None]
