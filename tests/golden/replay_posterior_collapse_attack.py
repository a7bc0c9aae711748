"""The loss that collapses a posterior with its gradients, and the attack on a linear-Gaussian encoder."""

import torch
from cases import Case

from verl_plugins.labs.posterior_collapse_attack import attack, collapse_loss


def replay(case: Case, expected: dict) -> dict:
    reverse = case.param("reverse_direct", False)
    if case.param("mode", "loss") == "loss":
        mean, logvar = (case.tensor(name).requires_grad_() for name in ("mean", "logvar"))
        given = case.input("v", case.param("v", 1e-8))
        v = logvar.detach().exp() if given is None else torch.tensor(given, dtype=torch.float64)
        loss = collapse_loss(mean, logvar, v, reverse, case.param("reduction", "mean"))
        loss.sum().backward()
        return {"loss": loss.tolist(), "grad_mean": mean.grad.tolist(), "grad_logvar": logvar.grad.tolist()}
    of_mean, of_logvar = case.tensor("enc_mean_weight"), case.tensor("enc_logvar_weight")
    bias, images = case.param("logvar_bias", -1.0), case.tensor("x")

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ of_mean, x @ of_logvar + bias

    perturbed, losses = attack(
        encode,
        images,
        case.param("eps", 16 / 255),
        case.param("alpha", 2 / 255),
        case.param("steps", 10),
        case.param("v", 1e-8),
        reverse,
    )
    return {
        "x_adv": perturbed.tolist(),
        "loss_history": losses,
        "mean_norm_before": float(encode(images)[0].norm()),
        "mean_norm_after": float(encode(perturbed)[0].norm()),
    }
