"""MoPPS: the plugin's own hooks on a pool that is given, with draws that are given."""

from types import SimpleNamespace

import numpy as np
from cases import Case, in_order_of
from fakes import FakeDataset, FakeRun
from replay_vade import batch_of

from verl_plugins.sampling.mopps import Mopps

SETTINGS = ("decay", "strategy", "prior_alpha", "prior_beta", "target", "lower", "upper")


def replay(case: Case, expected: dict) -> dict:
    op = case.param("op")
    assert op == "select_then_update", f"unknown op {op!r}"
    ids = np.array(case.input("candidate_ids"), dtype=np.int64)
    columns = ("alpha", "beta", "theta", "success_rate_if_selected")
    alpha, beta, theta, rate = (np.array(case.input(name), dtype=np.float64) for name in columns)
    count, n = case.param("batch_size"), case.param("group_size")
    usual = Mopps.Config()
    plugin = Mopps(Mopps.Config(**{name: case.param(name, getattr(usual, name)) for name in SETTINGS}))
    run = FakeRun(dataset=FakeDataset(int(ids.max()) + 1))
    plugin._prepare(len(run.dataset))
    plugin.right[ids] = alpha - plugin.config.prior_alpha
    plugin.wrong[ids] = beta - plugin.config.prior_beta
    plugin._next_pool = lambda run, count: ids
    own = run.rng
    run.rng = lambda name: SimpleNamespace(beta=lambda a, b: theta) if name == "theta" else own(name)
    selected = plugin.select_prompts(run, count)
    rates = dict(zip(ids.tolist(), rate.tolist(), strict=True))
    correct = np.array([round(rates[prompt] * n) for prompt in selected.tolist()])
    plugin.observe(run, batch_of(selected, correct, n))
    belief = plugin._belief(ids)
    order = in_order_of(expected.get("selected_ids"), selected)  # a step asks all of them
    return {"selected_ids": selected[order], "alpha": belief[0], "beta": belief[1]}
