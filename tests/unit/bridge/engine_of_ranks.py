"""The engine of the preset cpu on one rank or two, without Ray: one update under `ghosts_of_softmax`, and what is seen.

Packed rows go verl's own way in it.
`python engine_of_ranks.py RANKS FOLDER` reads the model in FOLDER/model and writes FOLDER/<ranks>_<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROWS, TEMPERATURE, ALL, FEW = 8, 0.7, 1000, 10


def rows() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Prompt, response and mask of each; one response is not all generated, one not at all."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(0, 250, (size,), generator=generator)  # noqa: E731
    found = []
    for row in range(ROWS):
        prompt, response = draw(2 + row % 5), draw(1 + (3 * row) % 8)
        found.append((prompt, response, torch.ones_like(response)))
    found[3][2][0] = 0
    found[5][2][:] = 0
    return found


def mini_batch(mine: list[tuple[torch.Tensor, ...]], padded: bool) -> Any:
    """As verl's worker hands it to the engine, in micro-batches of 40 tokens."""
    from verl.utils import tensordict_utils as tu

    nested = lambda parts: torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)  # noqa: E731
    whole = [torch.cat(row[:2]) for row in mine]
    tensors = {name: nested(row[place] for row in mine) for place, name in enumerate(("prompts", "responses"))}
    masks = dict.fromkeys(("response_mask", "loss_mask"), nested(row[2] for row in mine))
    positions = nested(torch.arange(len(row)) for row in whole)
    settings = {"temperature": TEMPERATURE, "use_dynamic_bsz": True, "max_token_len_per_gpu": 40, "pad_token_id": 0}
    settings |= {"use_remove_padding": not padded, "use_fused_kernels": False}
    return tu.get_tensordict({**tensors, **masks, "input_ids": nested(whole), "position_ids": positions}, settings)


def made(folder: Path, kind: type | None = None, **of_model: Any) -> Any:
    """The engine, or one of another kind, with the settings of the preset cpu and further ones of the model."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from verl_plugins.cpu.engine import ResponseEngine

    single = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    of_model = {"enable_gradient_checkpointing": False, **of_model}
    model = HFModelConfig(
        path=str(folder / "model"),
        use_remove_padding=False,
        override_config={"attn_implementation": "sdpa"},
        **of_model,
    )
    settings = FSDPEngineConfig(strategy="fsdp2", dtype="float32", use_torch_compile=False, mixed_precision=single)
    engine = (kind or ResponseEngine)(
        model, settings, FSDPOptimizerConfig(lr=0.02, total_training_steps=9), CheckpointConfig()
    )
    engine.initialize()
    return engine


def loss(model_output: Any, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
    """A sum over generated tokens, so that the split over ranks does not matter."""
    from verl.workers.utils.padding import no_padding_2_padding

    log_probs, mask = no_padding_2_padding(model_output["log_probs"], data), data["response_mask"].to_padded_tensor(0)
    return -(log_probs * mask).sum(), {}


def whole_parameters(engine: Any) -> list[torch.Tensor]:
    return [parameter.detach().full_tensor() for parameter in engine.module.parameters()]


def seen(engine: Any, data: Any) -> dict[str, Any]:
    """Logits at the parameters as they are and at others, and what is left of the visit."""
    from verl_plugins.bridge import probe

    parts = probe.trained(engine.module)
    before = [part.clone() for part in parts]
    found = {"here": probe.logits(engine, data, ALL), "few": probe.logits(engine, data, FEW)}
    found["moved"] = probe.logits(engine, data, ALL, at=(1.1 * part for part in before))
    found["again"] = probe.logits(engine, data, ALL)
    forward, engine.module.forward = engine.module.forward, lambda **_: 1 / 0
    try:
        probe.logits(engine, data, ALL, at=(0 * part for part in before))
    except ZeroDivisionError:
        found["raised"] = True
    engine.module.forward = forward
    found["after an error"] = probe.logits(engine, data, ALL)
    found["kept"] = all(map(torch.equal, parts, before))
    found["training"], found["own method"] = engine.module.training, "prepare_model_outputs" not in vars(engine)
    found["gathered"] = probe.gather(torch.arange(torch.distributed.get_rank() + 1.0))
    return found


def updated(engine: Any, data: Any) -> tuple[dict[str, float], list[torch.Tensor]]:
    """What the plugin says of one update, and the parameters after it."""
    from verl_plugins.bridge.actor import EngineActor
    from verl_plugins.bridge.defaults import ActorDefaults
    from verl_plugins.bridge.joined import JoinedMetrics
    from verl_plugins.composition.manager import Plugins
    from verl_plugins.optim.ghosts_of_softmax import GhostsOfSoftmax
    from verl_plugins.optim.stablemax import Saturation

    plugins = Plugins(
        [GhostsOfSoftmax(GhostsOfSoftmax.Config(probe_tokens=ALL)), Saturation(Saturation.Config(probe_tokens=ALL))]
    )
    plugins.add_fallback(ActorDefaults(engine.optimizer_step))
    state = SimpleNamespace(plugins=plugins, step=1, mini_batch=0, enter_step=int, next_mini_batch=lambda: None)
    metrics = JoinedMetrics()
    actor, train_batch = EngineActor(engine, state, metrics), engine.train_batch
    engine.optimizer_step = actor.optimizer_step
    actor.train_batch(train_batch, data, loss_function=loss)
    told = {key.rpartition("/")[2]: values[0] for key, (_, values) in metrics.take().items()}
    return told, whole_parameters(engine)


def worker(rank: int, ranks: int, folder: Path) -> None:
    import verl  # noqa: F401  its platform is the CPU

    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meet_{ranks}'}"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, init_method=meeting)
    engine, mine = made(folder), rows()[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
    with engine.train_mode():
        found = seen(engine, mini_batch(mine, padded=True))
        found["packed"] = seen(engine, mini_batch(mine, padded=False))["here"]
        found["metrics"], found["parameters"] = updated(engine, mini_batch(mine, padded=True))
    torch.save(found, folder / f"{ranks}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(VERL_PLUGINS_RUN="1", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
