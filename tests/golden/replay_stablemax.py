"""StableMax: what verl makes of shaped logits: log-probs, entropy, the sum of squares, and the gradient of a loss."""

import torch
from cases import Case, NotOffered
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import torch_functional

from verl_plugins.optim.stablemax import StableMax


def replay(case: Case, expected: dict) -> dict:
    if case.param("eps", 1e-30) != 1e-30:
        raise NotOffered("symlog has no epsilon; the authors' one, 1e-30, changes nothing")
    labels = torch.tensor(case.input("labels"), dtype=torch.long)
    given = case.tensor("logits")
    leaf = (given if given.numel() else given.reshape(*labels.shape, 1 if not labels.numel() else -1)).requires_grad_()
    logits = StableMax(StableMax.Config(dtype="float64")).shape_logits(leaf)
    log_prob = torch_functional.logprobs_from_logits_naive(logits, labels)
    if case.param("op") == "cross_entropy":
        reduce = case.param("reduction", "mean")
        losses = -log_prob
        loss = losses.sum() / (max(losses.numel(), 1) if reduce == "mean" else 1)
        found = {"loss": losses.tolist() if reduce == "none" else loss.item()}
    else:
        mask = torch.tensor(case.input("response_mask"), dtype=torch.float64)
        losses, mode = -case.tensor("advantages") * log_prob, case.param("loss_agg_mode", "token-mean")
        loss = agg_loss(losses, mask, mode) if mask.any() else (losses * mask).sum()
        pi = torch_functional.calculate_sum_pi_squared_from_logits(logits)
        parts = {
            "log_prob": log_prob,
            "entropy": torch_functional.entropy_from_logits(logits),
            "sum_pi_squared": pi,
        }
        found = {"loss": loss.item()} | {name: (values * mask).tolist() for name, values in parts.items()}
    loss.backward()
    return found | {"grad_logits": leaf.grad.tolist()}
