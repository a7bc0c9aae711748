"""The entropy law: each point as a validation and the batch after it, through the plugin's hooks, and its fit."""

import numpy as np
import torch
from cases import Case
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.diagnostics.entropy_law import EntropyLaw


def replay(case: Case, expected: dict) -> dict:
    entropy, score = (np.array(case.input(name), dtype=np.float64) for name in ("entropy", "performance"))
    count = case.param("n_fit", None)
    plugin = EntropyLaw(EntropyLaw.Config(fit_points=count, min_points=2))
    for measured, validated in zip(entropy, score, strict=True):
        plugin.on_validation_end({"val-core/case/acc/mean@1": validated})
        plugin.observe(FakeRun(), batch(measured))
    law, points = plugin.law(), plugin.state_dict()
    first = slice(count)
    found = {"n_used": len(points["score"][first]), "law_applies": law is not None and law.ceiling is not None}
    if law is None:
        return found | dict.fromkeys(("a", "b", "ceiling", "rmse_fit", "r2", "predicted", "rmse_all"))
    error = points["score"] - law.predicted(points["entropy"])
    return found | {
        "a": law.a,
        "b": law.b,
        "ceiling": law.ceiling,
        "rmse_fit": law.rmse,
        "r2": law.r2,
        "predicted": law.predicted(wanted(entropy, points["entropy"], expected.get("predicted"))),
        "rmse_all": np.sqrt(np.mean(error**2)),
    }


def wanted(entropy: np.ndarray, complete: np.ndarray, expected: list | None) -> np.ndarray:
    """Where a case predicts: at every entropy, null where there is none, at those there are, or at complete points."""
    for some in (entropy, entropy[np.isfinite(entropy)], complete):
        if expected is None or len(some) == len(expected):
            return some
    return entropy


def batch(entropy: float) -> Batch:
    ones = torch.ones(1, 1, dtype=torch.float64)
    return Batch.from_tensors(uid=["1-1-0"], response_mask=ones, rm_scores=0 * ones, entropy=entropy * ones)
