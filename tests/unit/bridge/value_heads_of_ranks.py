"""A value model with heads on one rank or two, without Ray: its values, and the gradients of one loss under `ravl`.

`python value_heads_of_ranks.py RANKS HEADS FOLDER` reads the model in FOLDER/model, with LAYER for its last layer, and
writes FOLDER/<ranks>_<heads>_<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine_of_ranks import ROWS, mini_batch, rows

ETA, CLIP = 0.7, 0.1


def layer(heads: int) -> torch.Tensor:
    """[N,D] weights of the heads."""
    return torch.randn(heads, 128, generator=torch.Generator().manual_seed(7)) / 10


def known(heads: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Old values [T,N] and returns [T] of each row."""
    generator = torch.Generator().manual_seed(1)
    sizes = [len(response) for _, response, _ in rows()]
    return [[torch.randn(size, *more, generator=generator) / 5 for size in sizes] for more in ((heads,), ())]  # type: ignore[return-value]


def made(folder: Path, heads: int) -> Any:
    """The engine as verl's worker makes it."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.base import EngineRegistry

    from verl_plugins.bridge.critic import ValueHeadsEngine, register_engine

    single = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    override = {"attn_implementation": "sdpa", **({"num_value_heads": heads} if heads > 1 else {})}
    model = HFModelConfig(
        path=str(folder / "model"),
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config=override,
    )
    model.model_type = "value_model"
    settings = FSDPEngineConfig(strategy="fsdp2", dtype="float32", use_torch_compile=False, mixed_precision=single)
    register_engine()
    register_engine()
    optimizer = FSDPOptimizerConfig(lr=0.02, total_training_steps=9)
    engine = EngineRegistry.new("value_model", "fsdp2", model, settings, optimizer, CheckpointConfig())
    assert isinstance(engine, ValueHeadsEngine)
    engine.initialize()
    return engine


def loss_of(engine: Any, heads: int) -> Any:
    from verl_plugins.advantage.ravl import Ravl
    from verl_plugins.bridge.critic import PluginValueLoss
    from verl_plugins.bridge.defaults import CriticDefaults
    from verl_plugins.composition.manager import Plugins

    plugins = Plugins([Ravl(Ravl.Config(members=heads, eta=ETA))])
    plugins.add_fallback(CriticDefaults())
    config = SimpleNamespace(cliprange_value=CLIP, loss_agg_mode="token-mean", loss_scale_factor=None)
    return PluginValueLoss(plugins, config, engine)


def set_layer(engine: Any, heads: int) -> None:
    """The same heads on any number of ranks."""
    from torch.distributed.tensor import distribute_tensor

    weight = engine.module.score.weight
    with torch.no_grad():
        weight.copy_(distribute_tensor(layer(heads), weight.device_mesh, weight.placements))
        engine.module.score.bias.zero_()


def worker(rank: int, ranks: int, heads: int, folder: Path) -> None:
    import verl  # noqa: F401  its platform is the CPU
    from verl.utils import tensordict_utils as tu

    from verl_plugins.cpu.platform import load_value_model

    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meet_{ranks}_{heads}'}"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, init_method=meeting)
    from verl.utils import model

    model.load_valuehead_model = load_value_model
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    data = mini_batch(rows()[mine], padded=True)
    for name, values in zip(("head_values", "returns"), known(heads), strict=True):
        data[name] = torch.nested.as_nested_tensor(values[mine], layout=torch.jagged)
    tu.assign_non_tensor(data, global_batch_size=ROWS, temperature=1.0)
    engine = made(folder, heads)
    set_layer(engine, heads)
    loss = loss_of(engine, heads)
    with engine.train_mode():
        output = engine.forward_backward_batch(data, loss_function=loss)
        grads = {name: part.grad.full_tensor() for name, part in engine.module.named_parameters()}
        metrics = output["metrics"]["critic/vf_loss"]
    loss._metrics.close_mini_batch(engine.get_data_parallel_group())
    told = {key: values[0] for key, (_, values) in loss._metrics.take().items()}
    with engine.eval_mode():
        values = engine.infer_batch(data)["model_output"]["values"].unbind()
    found = {"grads": grads, "told": told, "values": list(values), "kept": engine.head_weight is None}
    found["loss"] = sum(metrics.values)
    torch.save(found, folder / f"{ranks}_{heads}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(VERL_PLUGINS_RUN="1", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    ranks, heads, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.multiprocessing.spawn(worker, (ranks, heads, folder), nprocs=ranks)
