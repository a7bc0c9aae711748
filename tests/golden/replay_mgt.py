"""Updates of deep stacks and its relatives, and the geometry of states by depth."""

import torch
from cases import Case

from verl_plugins.diagnostics.mgt import depth_geometry
from verl_plugins.labs.mgt import (
    delta_update,
    doubly_stochastic,
    erasing_update,
    gated,
    normed,
    signed_beta,
)


def replay(case: Case, expected: dict) -> dict:
    return {"delta_residual": delta, "sinkhorn": sinkhorn, "mgt_block": block, "depth_geometry": geometry}[
        case.param("mode")
    ](case)


def delta(case: Case) -> dict:
    x = case.tensor("x")
    context = case.tensor("context") if case.has("context") else normed(x)
    beta = 2 * (context @ case.tensor("beta_weight") + torch.tensor(case.input("beta_bias", [0.0]))).sigmoid()
    squashed, scale = case.param("v_sigmoid", True), case.param("v_sigmoid_scale", 4.0)
    constant, value = case.param("v_constant", False), case.param("v_constant_value", 2.0)
    bias, weight = torch.tensor(case.input("v_bias", [0.0])), case.input("v_weight", [0.0] * x.shape[-1])
    linear = x @ torch.tensor(weight, dtype=torch.float64) + bias
    v = torch.full_like(linear, value) if constant else scale * linear.sigmoid() if squashed else linear
    y = delta_update(x, case.tensor("k_in"), beta, v, case.param("k_eps", 1e-5))
    return {"y": y.tolist(), "beta": beta.tolist()}


def sinkhorn(case: Case) -> dict:
    found = doubly_stochastic(case.tensor("logits"), case.param("num_iters", 10), case.param("tau", 0.05))
    return {"doubly_stochastic": found.tolist(), "row_sums": found.sum(1).tolist(), "col_sums": found.sum(0).tolist()}


def block(case: Case) -> dict:
    x = case.tensor("x")
    gate, update = gated(x, case.tensor("v_raw"), case.tensor("gate_weight"), case.param("ln_eps", 1e-5))
    bias = torch.tensor(case.param("beta_bias", 0.0), dtype=torch.float64)
    beta = signed_beta(x, case.tensor("beta_weight"), case.param("beta_scale", 1.0), bias)
    y = erasing_update(x, update, beta, case.param("alpha", 1.0))
    return {name: value.tolist() for name, value in (("gate", gate), ("v_mhc", update), ("beta", beta), ("y", y))}


def geometry(case: Case) -> dict:
    mask = torch.tensor(case.input("mask")) if case.input("mask", None) is not None else None
    return {name: value.tolist() for name, value in depth_geometry(case.tensor("layer_states"), mask).items()}
