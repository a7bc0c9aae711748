"""The rule for latents and for slots, and the residual shares of a slot's prompts."""

import numpy as np
from cases import Case

from verl_plugins import Groups
from verl_plugins.diagnostics.be_more_active import BeMoreActive, classify, residual_share

DEFAULTS = BeMoreActive.Config()


def replay(case: Case, expected: dict) -> dict:
    of_slots = case.param("mode", None) == "conditioning_activity"
    thresholds = (
        case.param("var_threshold", DEFAULTS.var_threshold),
        case.param("mean_error_range", DEFAULTS.mean_error_range if of_slots else 0.1),
    )
    return slots(case, thresholds) if of_slots else latents(case, thresholds)


def latents(case: Case, thresholds: tuple[float, float]) -> dict:
    log_var = case.input("log_var")
    kinds = classify(
        np.exp(np.array(log_var, dtype=np.float64)).reshape(len(log_var), -1 if log_var else 0), *thresholds
    )
    found = {f"{kind}_variables_idx": np.flatnonzero(getattr(kinds, kind)) for kind in ("passive", "active", "mixed")}
    return found | {"means": kinds.mean, "variances": kinds.variance}


def slots(case: Case, thresholds: tuple[float, float]) -> dict:
    prompts = Groups([str(name) for name in case.input("uid")])
    share, evidence = residual_share(case.tensor("statistic"), case.input("slot"), prompts)
    names, some = prompts.labels[evidence.numpy()].tolist(), share[evidence].numpy()
    found = {"residual_share": dict(zip(names, some.tolist(), strict=True)), "n_prompts": len(some)}
    if not len(some):
        return found | {"mean": None, "variance": None, "kind": None}
    kinds = classify(some[:, None], *thresholds)
    (kind,) = (name for name in ("passive", "active", "mixed") if getattr(kinds, name)[0])
    return found | {"mean": kinds.mean[0], "variance": kinds.variance[0], "kind": kind}
