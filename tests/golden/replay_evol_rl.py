"""EVOL-RL: the hook that rewards, on the votes of one prompt with given embeddings."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from cases import Case, NotOffered
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.reward.evol_rl import BANDS, INVALID, EvolRl, after_thinking

FIXED = {"w_mean": 0.5, "w_max": 0.5, "band_majority": [*BANDS[True]], "band_minority": [*BANDS[False]]}
FIXED |= {"invalid_reward": INVALID}


def replay(case: Case, expected: dict) -> dict:
    for name, value in FIXED.items():
        if case.param(name, value) != value:
            raise NotOffered(f"{name} is {value}, not {case.param(name)}")
    texts, kept = case.input("responses"), case.param("n_samples_per_prompt")
    n = len(texts)
    given = case.input("embeddings")
    options = {"single_valid": case.param("single_valid", "authors"), "min_spread": case.param("min_spread", 0.0)}
    if rule := case.param("valid", None):
        options["valid"] = rule
    plugin = EvolRl(EvolRl.Config(**options))
    valid = plugin.valid(None, pd.Series(texts, dtype=object).map(after_thinking))
    of_valid = [row for row, there in zip(given, valid.tolist(), strict=True) if there]
    plugin.embed = lambda asked: np.array(of_valid, dtype=float).reshape(len(asked), -1 if of_valid else 1)
    scores = torch.zeros(n, 2)
    scores[:, 1] = torch.tensor(case.input("majority_match"))
    batch = Batch.from_tensors(
        uid=["5-1-0"] * n,
        rm_scores=scores,
        response_mask=torch.ones(n, 2, dtype=torch.bool),
        responses=torch.arange(n)[:, None].expand(n, 2),
        response_lengths=torch.full((n,), 2),
        tokenizer=SimpleNamespace(batch_decode=lambda ids, **_: [texts[row[0]] for row in ids]),
    )
    plugin.shape_rewards(FakeRun(), batch)
    return {"valid": valid, "rewards": batch.scores, "train_rewards": batch.scores[:kept]}
