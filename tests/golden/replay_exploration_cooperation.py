"""Exploration and cooperation: what is measured of each role, and how the roles' gradients lie."""

import torch
from cases import Case, NotOffered

from verl_plugins.diagnostics.role_metrics import role_summary
from verl_plugins.optim.gradient_coupling import coupling, products


def replay(case: Case, expected: dict) -> dict:
    mode = case.param("mode", "role_summary")
    if mode == "grouping":
        raise NotOffered("groups of roles with an adapter each: verl trains one adapter")
    return gradients(case) if mode == "gradient_coupling" else summary(case)


def summary(case: Case) -> dict:
    roles = [str(role) for role in case.input("role")]
    mask = matrix(case.input("response_mask")).bool()
    given = {"entropy": "entropy", "gap": "top2_logprob_gap"}
    fields = {name: matrix(case.input(key)) for name, key in given.items() if case.has(key)}
    decision = case.tensor("decision") if case.input("decision", None) is not None else None
    return role_summary(roles, mask, case.tensor("rewards"), decision=decision, **fields)


def gradients(case: Case) -> dict:
    rows = [torch.tensor(row, dtype=torch.float64) for row in case.input("role_gradients")]
    found = coupling(products(rows) if rows else torch.zeros(0, 0, dtype=torch.float64))
    return found._asdict()


def matrix(rows: list) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1 if rows else 0)
