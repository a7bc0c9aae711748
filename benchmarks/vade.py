"""VADE's draw and selection against numpy's own Beta draw of the same size.

python benchmarks/vade.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from timing import best_times, report

from verl_plugins.sampling.vade import decay_and_add, draw, select


def compare(prompts: int, batch: int = 512, seen: float = 0.5, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    asked = rng.random(prompts) < seen
    right = rng.integers(0, 9, prompts) * asked
    alpha, beta = right.astype(float), (8 * asked - right).astype(float)
    p, q = alpha + 1, beta + 1
    eligible = np.ones(prompts, dtype=bool)
    eligible[:100] = False
    ids = np.arange(batch)
    best = best_times(
        {
            "Beta draw": lambda: rng.beta(p, q),
            "draw + select": lambda: select(draw(rng, alpha, beta), None, batch),
            "draw + select, some in flight": lambda: select(draw(rng, alpha, beta), eligible, batch),
            "update": lambda: decay_and_add(
                alpha.copy(), beta.copy(), ids, np.ones(batch), np.full(batch, 8), 0.2, 0.999
            ),
        },
        rounds=2,
    )
    report(f"{prompts} prompts", best, "Beta draw")


if __name__ == "__main__":
    for prompts in (40_000, 1_000_000):
        compare(prompts)
