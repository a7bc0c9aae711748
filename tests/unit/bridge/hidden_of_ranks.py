"""The pass for the old log-probs with hooks in it, on one rank or two, without Ray: what it returns, row by row.

`python hidden_of_ranks.py RANKS FOLDER` reads the model in FOLDER/model and writes FOLDER/hidden_<ranks>_<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from engine_of_ranks import ROWS, made, mini_batch, rows

SEED, TOKENS = 7, 3
KEYS = [f"{row // 2}-1-{row // 2}_{row % 2}_0" for row in range(ROWS)]


def wishes() -> list[Any]:
    """Two plugins' in step 1, a third one's that is not due in it but every second step from then on."""
    from verl_plugins.hidden import Wish

    return [Wish(tokens=2, every=2, layer_step=2), Wish(tokens=TOKENS, every=2, head_rows=True, argmax=True)]


def passed(engine: Any, mine: list[int], step: int, padded: bool, sent: bool, **settings: Any) -> dict[str, Any]:
    """What one pass returns for these rows; `sent`: the prompts are among the fields."""
    from verl.utils import tensordict_utils as tu

    from verl_plugins.bridge.hidden import MEASURED_STEP, PLACES
    from verl_plugins.hidden import chosen_places

    data = mini_batch([rows()[row] for row in mine], padded)
    mask = data["response_mask"].to_padded_tensor(0)
    data[PLACES] = chosen_places([KEYS[row] for row in mine], mask, TOKENS, SEED)
    if not sent:
        del data["prompts"]
    told = {MEASURED_STEP: step} if step else {}
    tu.assign_non_tensor(data, calculate_entropy=True, **told, **settings)
    with engine.eval_mode():
        output = engine.infer_batch(data, loss_function=None)["model_output"]
    found = {name: torch.nested.to_padded_tensor(values, -7.0).float() for name, values in output.items()}
    return {**found, PLACES: data[PLACES], "rows": torch.tensor(mine)}


def worker(rank: int, ranks: int, folder: Path) -> None:
    import verl  # noqa: F401  its platform is the CPU
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from verl_plugins.bridge import hidden

    hidden.TRAVELS_AS = torch.float32  # to see what was taken, before it is rounded
    torch.set_num_threads(1)
    meeting = f"file://{folder / f'meet_hidden_{ranks}'}"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, init_method=meeting)
    mine = list(range(rank, ROWS, ranks))
    found = {}
    for name, kind, settings in (
        ("ours", None, {}),
        ("verl's", FSDPEngineWithLMHead, {"enable_gradient_checkpointing": True}),
        ("lora", None, {"lora_rank": 4, "target_modules": "all-linear"}),
    ):
        engine = made(folder, kind, **settings)
        hidden.TakesStates(engine, wishes())
        found[name] = passed(engine, mine, 1, padded=True, sent=False)
        found[f"{name}, prompts sent"] = passed(engine, mine, 1, padded=True, sent=True)
        found[f"{name}, packed"] = passed(engine, mine, 1, padded=False, sent=False)
        found[f"{name}, fixed size"] = passed(
            engine, mine, 1, padded=False, sent=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2
        )
        found[f"{name}, step 2"] = passed(engine, mine, 2, padded=False, sent=False)
        found[f"{name}, not asked"] = passed(engine, mine, 0, padded=False, sent=False)
        found[f"{name}, alike"] = passed(engine, [1, 4, 1, 4, 4, 1], 1, padded=False, sent=False)
        model = hidden.causal_model(engine.module)
        found[f"{name}, hooks left"] = sum(
            "before_" in str(hook) for part in model.modules() for hook in part._forward_pre_hooks.values()
        )
    torch.save(found, folder / f"hidden_{ranks}_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(VERL_PLUGINS_RUN="1", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    torch.multiprocessing.spawn(worker, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]))
