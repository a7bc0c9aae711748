"""`actor.gradients`: the gradient of a mini-batch in parts, one for each value that a field has in its rows.

The engine's own pass, forward and backward, is made once for each value over the same micro-batches; of the loss only
the rows with that value remain, divided by what the whole mini-batch is divided by. So the parts add up to the gradient
that is there, which is set aside meanwhile and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id, get_device_name

from verl_plugins.bridge.loss import PluginLoss
from verl_plugins.errors import DataError


def gradients(
    engine: Any, data: TensorDict, loss: PluginLoss, name: str, parameters: Sequence[Tensor]
) -> dict[float, list[Tensor]]:
    """By value other than 0, this rank's parts of the parameters' gradients; a collective call.

    Args:
        engine: verl's FSDP engine, with the second FSDP.
        data: the mini-batch of this rank.
        loss: of the actor.
        name: a field [rows] put by a plugin.
        parameters: some of the module's.

    Raises:
        DataError: there is no such field.
    """
    if name not in data:
        raise DataError(f"field {name!r} did not reach the actor; put it there with batch.put in observe")
    found = {}
    with _set_aside(engine.module), _same_random_numbers():
        for value in _values(data[name], engine.get_data_parallel_group()):
            for parameter in engine.module.parameters():
                parameter.grad = None
            with loss.aside():
                engine.forward_backward_batch(data, partial(_of_rows, loss, name, value), forward_only=False)
            found[value] = [_local(parameter) for parameter in parameters]
    return found


def _values(field: Tensor, group: Any) -> list[float]:
    """What the rows of all ranks have, in order; 0 is that of rows which fill up the batch."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, field.unique().tolist(), group=group)
    return sorted({float(value) for values in everyone for value in values} - {0.0})


def _of_rows(
    loss: PluginLoss, name: str, value: float, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> Any:
    """The loss of a micro-batch, in which tokens of other rows are not trained on."""
    rows = [mask * own for mask, own in zip(data["loss_mask"].unbind(), data[name] == value, strict=True)]
    only = data.clone(recurse=False)
    only["loss_mask"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return loss(model_output, only, dp_group)


@contextmanager
def _set_aside(module: torch.nn.Module) -> Iterator[None]:
    """The gradients are those of before afterwards, whatever happens."""
    parameters = list(module.parameters())
    kept = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def _local(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return (gradient.to_local() if isinstance(gradient, DTensor) else gradient).detach().clone()


def _same_random_numbers() -> Any:
    """Dropout draws afterwards what it would have drawn."""
    if get_device_name() == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[get_device_id()], device_type=get_device_name())
