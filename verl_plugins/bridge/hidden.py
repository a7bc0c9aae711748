"""`batch.hidden`: states inside the policy, taken in the pass for the old log-probs, read once by the driver, and gone.

The driver chooses the tokens of each row, by what the row is, and sends their places as a column. In the actor workers
hooks stand on the decoder layers and the output head for the length of that pass alone; they keep the chosen places of
each micro-batch, and the mean over each response. verl puts rows back in order and stores what is returned with its own
outputs. The driver then overwrites these columns with one number per row: TransferQueue cannot drop a column, and later
calls of workers would fetch it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from verl_plugins.cpu.engine import KEPT
from verl_plugins.errors import RunError
from verl_plugins.hidden import Asked, Hidden, Wish, chosen_places, united

MEASURED_STEP = "hidden_states_step"
"""In a pass in which hidden states are taken: the training step."""
PLACES = "hidden_places"
"""Of each row [k]: which tokens of the response are looked at, in the order they were chosen in; -1: no further one."""
LAYERS, FEATURES, POOLED, LABELS = "hidden_layers", "hidden_features", "hidden_pooled", "hidden_labels"
HEAD_ROWS, ARGMAX = "hidden_head_rows", "hidden_argmax"
RETURNED = (LAYERS, FEATURES, POOLED, LABELS)
TRAVELS_AS = torch.bfloat16


# In the driver


class ReadStates:
    """What came back of a pass, by row key."""

    def __init__(self, keys: Sequence[str], columns: dict[str, Tensor]) -> None:
        self._place = {key: place for place, key in enumerate(keys)}
        self._columns = columns

    def of(self, keys: Sequence[str]) -> Hidden:
        """Those of some of the rows, in the order given."""
        at = torch.tensor([self._place[key] for key in keys])
        columns = {name: values[at] for name, values in self._columns.items()}
        row, draw = (columns[PLACES] >= 0).nonzero(as_tuple=True)
        known = {name: values[row, draw] for name, values in columns.items() if name not in (LAYERS, POOLED)}
        return Hidden(
            layers=tuple(columns[LAYERS][0].tolist()),
            features=known[FEATURES].float(),
            row=row,
            position=known[PLACES],
            draw=draw,
            label=known[LABELS],
            pooled=columns[POOLED].float(),
            head_row=known[HEAD_ROWS].float() if HEAD_ROWS in known else None,
            argmax=known.get(ARGMAX),
        )


def ask(batch: KVBatchMeta, wishes: Sequence[Wish], step: int, seed: int) -> Asked | None:
    """Have the next pass over `batch` take what is wished for in this step; None, and nothing done, if nothing is."""
    asked = united(wishes, step)
    if asked is None:
        return None
    mask = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
    places = chosen_places(batch.keys, mask["response_mask"].to_padded_tensor(0), asked.tokens, seed)
    _put(batch, {PLACES: places})
    batch.fields = [*batch.fields, PLACES]
    batch.extra_info[MEASURED_STEP] = step
    return asked


def read(batch: KVBatchMeta, asked: Asked) -> ReadStates:
    """What the pass has left in the queue, which is rid of it."""
    names = [*RETURNED, *([HEAD_ROWS] if asked.head_rows else []), *([ARGMAX] if asked.argmax else []), PLACES]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    columns = {name: torch.stack(list(data[name].unbind())) for name in names}
    _put(batch, {name: values.new_zeros(len(values), 1) for name, values in columns.items()})
    return ReadStates(batch.keys, columns)


def _put(batch: KVBatchMeta, columns: dict[str, Tensor]) -> None:
    table = TensorDict(columns, batch_size=len(batch.keys))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=table)


# In the actor workers


class TakesStates:
    """Put into an engine of verl's; acts in passes that say so."""

    def __init__(self, engine: Any, wishes: Sequence[Wish]) -> None:
        self._engine, self._wishes = engine, wishes
        engine.infer_batch = partial(self.infer_batch, engine.infer_batch)

    def infer_batch(self, infer_batch: Callable[..., dict], data: TensorDict, *args: Any, **kwargs: Any) -> dict:
        """The engine's pass, with hooks in a step that is measured."""
        step = tu.get_non_tensor_data(data, MEASURED_STEP, 0)
        asked = united(self._wishes, step) if step else None
        with nullcontext() if asked is None else self._watching(asked):
            return infer_batch(data, *args, **kwargs)

    @contextmanager
    def _watching(self, asked: Asked) -> Iterator[None]:
        engine = self._engine
        model = causal_model(engine.module)
        depth = model.config.get_text_config().num_hidden_layers
        layers = asked.layers(depth)
        taking = _Taking(engine, asked, layers)
        decoder = decoder_layers(model, depth) if len(layers) > 1 else ()
        hooks = [(decoder[layer], partial(taking.before_layer, layer)) for layer in layers[:-1]]
        hooks.append((model.get_output_embeddings(), taking.before_head))
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        replaced = {"prepare_model_inputs": taking.inputs, "prepare_model_outputs": taking.outputs}
        try:
            with patch.multiple(engine, **replaced):
                yield
        finally:
            for handle in handles:
                handle.remove()


def causal_model(module: torch.nn.Module) -> Any:
    """The language model of Transformers inside FSDP and PEFT."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def decoder_layers(model: Any, depth: int) -> torch.nn.ModuleList:
    """The decoder's layers.

    Raises:
        RunError: the model has no list of them.
    """
    for part in model.get_decoder().modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == depth:
            return part
    raise RunError(
        f"hidden states of several layers are wished for, and {type(model).__name__} has no list of its {depth} "
        "decoder layers: switch the plugin off, or have it look at the last layer only"
    )


class _Where(NamedTuple):
    """Places of tokens in a micro-batch: those that predict what is looked at, or what was generated."""

    rows: Tensor
    places: Tensor

    def of(self, values: Tensor, offsets: Tensor | None, first: int) -> Tensor:
        """[n, …] of values [1, all tokens, …] that are packed by offsets, or [B, L, …] from place `first` on."""
        if offsets is not None:
            return values[0, offsets[self.rows] + self.places]
        return values[self.rows, self.places - first]


class _Taking:
    """One pass: what hooks find in a micro-batch, until its outputs are made."""

    def __init__(self, engine: Any, asked: Asked, layers: Sequence[int]) -> None:
        self._asked, self._layers = asked, layers
        self._inputs, self._outputs = engine.prepare_model_inputs, engine.prepare_model_outputs
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._head_rows: Tensor | None = None

    def inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """The engine's, and where its tokens are."""
        inputs, args = self._inputs(micro_batch=micro_batch)
        ids, mask, places = micro_batch["input_ids"], micro_batch["loss_mask"], micro_batch[PLACES]
        self._places = places.to_padded_tensor(-1) if places.is_nested else places
        self._packed = ids.offsets() if "temperature_rmpad" in args else None
        self._first = int(args[KEPT][0]) if KEPT in args else 0
        # A token is predicted by the one before it, and a response ends where its row does.
        before = (ids.offsets().diff() - mask.offsets().diff() - 1)[:, None]
        rows, draws = (self._places >= 0).nonzero(as_tuple=True)
        self._chosen = _Where(rows, (before + self._places)[rows, draws])
        self._labels = ids.values()[ids.offsets()[rows] + self._chosen.places + 1]
        rows, tokens = mask.to_padded_tensor(0).nonzero(as_tuple=True)
        self._generated = _Where(rows, before[rows, 0] + tokens)
        return inputs, args

    def before_layer(self, layer: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._take(layer, args[0] if args else kwargs["hidden_states"], 0)

    def before_head(self, head: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._take(self._layers[-1], args[0] if args else kwargs["input"], self._first)
        if self._asked.head_rows:
            # Indexed here: FSDP holds the whole weight while the module runs.
            weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight
            self._head_rows = weight.detach()[self._labels]

    def _take(self, layer: int, states: Tensor, first: int) -> None:
        counts = torch.bincount(self._generated.rows, minlength=len(self._places))
        sums = torch.segment_reduce(
            self._generated.of(states, self._packed, first).float(), "sum", lengths=counts, axis=0, initial=0
        )
        self._found[layer] = self._chosen.of(states, self._packed, first), sums / counts.clamp(min=1)[:, None]

    def outputs(self, output: Any, **arguments: Any) -> dict[str, Tensor]:
        """The engine's, and what was found, [B, …] each."""
        best = self._best(output.logits) if self._asked.argmax else None  # before verl scales logits in place
        found = self._outputs(output=output, **arguments)
        features, pooled = (torch.stack(parts, 1) for parts in zip(*map(self._found.get, self._layers), strict=True))
        found |= {
            FEATURES: self._in_rows(features.to(TRAVELS_AS)),
            POOLED: pooled.to(TRAVELS_AS),
            LABELS: self._in_rows(self._labels),
            LAYERS: torch.tensor(self._layers, device=pooled.device).expand(len(pooled), -1),
        }
        if self._head_rows is not None:
            found[HEAD_ROWS] = self._in_rows(self._head_rows.to(TRAVELS_AS))
        if best is not None:
            found[ARGMAX] = self._in_rows(best)
        return found

    def _best(self, logits: Tensor) -> Tensor:
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        return self._chosen.of(logits, self._packed, self._first).argmax(-1)

    def _in_rows(self, values: Tensor) -> Tensor:
        """[n, …] of the chosen tokens -> [B, k, …], 0 where a row has no further one."""
        table = values.new_zeros(*self._places.shape, *values.shape[1:])
        table[self._places >= 0] = values
        return table
