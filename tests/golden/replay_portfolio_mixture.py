"""Portfolio mixture: the plugin's own mixture on given relatives, its rounding, and relatives from utilities."""

import numpy as np
from cases import Case

from verl_plugins.sampling.mixture import Mixture, largest_remainder, log_relatives, make_level
from verl_plugins.sampling.portfolio_mixture import PortfolioMixture

USUAL = PortfolioMixture.Config()
"""For settings that a case leaves out."""
BATCH = 32


def replay(case: Case, expected: dict) -> dict:
    if case.param("method", USUAL.mode) == "relatives":
        return {"price_relatives": relatives(case)}
    return mixed(case)


def relatives(case: Case) -> list:
    scale = case.param("scale", USUAL.scale)
    utility = [np.array(row, dtype=float) for row in case.input("utility")]
    everything = [[True] * len(row) for row in utility]
    observed = [np.array(row, dtype=bool) for row in case.input("observed", everything)]
    return [np.exp(log_relatives(u, seen, scale)) for u, seen in zip(utility, observed, strict=True)]


def mixed(case: Case) -> dict:
    given = case.input("price_relatives")
    method = case.param("method", USUAL.mode)
    inner = case.param("inner", USUAL.inner)
    start = case.param("w0", None)
    level = make_level(
        inner if method == "hierarchical" else method,
        case.param("q", USUAL.q),
        case.param("prior", USUAL.prior),
        case.param("eta", USUAL.eta),
        start,
    )
    groups = case.input("groups", None)
    if groups is None:
        groups = [list(range(len(given[0] if given else start or [1.0])))]
    # As recorded: without a floor unless the case has one.
    mixture = Mixture([np.array(group) for group in groups], level, case.param("floor", 0.0), case.param("rho", 1.0))
    weights, combined = [mixture.weights()], [0.0]
    for row in given:
        with np.errstate(divide="ignore"):
            mixture.add(np.log(np.array(row, dtype=float)))
        weights.append(mixture.weights())
        combined.append(mixture.combined)
    size = case.param("batch_size", BATCH)
    return {
        "weights": weights,
        "combined_wealth": np.exp(combined),
        "component_wealth": np.exp(mixture.log_wealth),
        "prompt_counts": [largest_remainder(row, size) for row in weights],
    }
