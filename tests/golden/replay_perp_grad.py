"""⊥Grad: the gradients a base optimiser sees, and what its steps make of the weights."""

from types import SimpleNamespace

import torch
from cases import Case, NotOffered

from verl_plugins.optim.perp_grad import PerpGrad, project


def replay(case: Case, expected: dict) -> dict:
    weights = [torch.nn.Parameter(torch.tensor(one, dtype=torch.float64)) for one in case.input("params")]
    options = {"granularity": case.param("granularity", "per_tensor"), "rescale": case.param("rescale", True)}
    if case.param("op") == "project":
        if case.param("eps", 1e-30) != 1e-30:
            raise NotOffered("the epsilon is 1e-30")
        given = case.input("grads")
        there = [place for place, one in enumerate(given) if one is not None]
        found = project(
            [weights[place].detach() for place in there],
            [torch.tensor(given[place], dtype=torch.float64) for place in there],
            min_orth_ratio=case.param("min_orth_ratio", 0.0),
            **options,
        )
        new, cosine = [None] * len(given), [None] * len(given)
        for place, gradient, cos in zip(there, found.gradients, found.cosine.tolist(), strict=True):
            new[place], cosine[place] = gradient.tolist(), cos
        return {"new_grads": new, "cos_w_g": cosine}
    if case.param("eps_projection", 1e-30) != 1e-30:
        raise NotOffered("the epsilon is 1e-30")
    names = ("lr", "momentum", "weight_decay", "betas", "eps")
    chosen = {name: case.param(name) for name in names if case.param(name, None) is not None}
    optimizer = getattr(torch.optim, case.param("base_optimizer"))(weights, **chosen)
    actor = SimpleNamespace(module=torch.nn.ParameterList(weights), log=lambda metrics: None)
    plugin, steps = PerpGrad(PerpGrad.Config(min_ndim=0, min_orth_ratio=0.0, **options)), []
    for gradients in case.input("grads_per_step"):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
        step = plugin.optimizer_step(actor)
        next(step)
        optimizer.step()
        steps.append([weight.detach().tolist() for weight in weights])
    return {"params_per_step": steps}
