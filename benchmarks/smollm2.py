"""A step of the preset `smollm2` against the matrix products it cannot do without.

    python benchmarks/smollm2.py RUN

RUN is the folder of a run. Times the products of the model's layers alone, in float32 and with as many threads as the
run had, for the tokens its steps had: prompts read once per group, one token per response and position generated, a
forward pass for the old log-probs, and three for the update. Attention, softmax and optimiser are not in the floor.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from verl_plugins.cpu.demo import read_metrics

PARTS = {"generation": "timing_s/gen", "old log-probs": "timing_s/old_log_prob", "update": "timing_s/update_actor"}
REPEATS = 3


def main(run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    steps = read_metrics(run / "metrics.jsonl")[0][1:]
    mean = {
        key: median(step[key] for step in steps) for key in ("prompt_length/mean", "response_length/mean", "seconds")
    }
    prompts = config.data.train_batch_size
    rows = prompts * config.actor_rollout_ref.rollout.n
    prompt, response = round(mean["prompt_length/mean"]), round(mean["response_length/mean"])
    shapes = layers(AutoConfig.from_pretrained(config.actor_rollout_ref.model.path))
    whole = products(shapes, rows * (prompt + response))
    floor = {
        "generation": products(shapes, prompts * prompt) + response * products(shapes, rows),
        "old log-probs": whole,
        "update": 3 * whole,
    }
    print(f"{len(steps)} steps, {rows} responses of {response} tokens to {prompts} prompts of {prompt}; seconds")
    for part, value in floor.items():
        taken = [step[PARTS[part]] for step in steps if PARTS[part] in step]
        print(f"{part:15} {value:6.1f} floor" + (f"  {median(taken):6.1f} taken" if taken else ""))
    total = sum(floor.values())
    print(
        f"{'step':15} {total:6.1f} floor  {mean['seconds']:6.1f} taken  {mean['seconds'] / total:.2f} times the floor"
    )


def layers(model: AutoConfig) -> list[tuple[int, int, int]]:
    """(in, out, how often) of every product of a token's forward pass."""
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, shared = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    block = [(hidden, heads), (hidden, shared), (hidden, shared), (heads, hidden)]
    block += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return [(*shape, model.num_hidden_layers) for shape in block] + [(hidden, model.vocab_size, 1)]


def products(shapes: list[tuple[int, int, int]], tokens: int) -> float:
    """Seconds of one forward pass over so many tokens."""
    total = 0.0
    for inside, outside, count in shapes:
        values, weight = torch.randn(tokens, inside), torch.randn(outside, inside)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch.nn.functional.linear(values, weight)
            times.append(time.perf_counter() - start)
        total += count * min(times)
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]))
