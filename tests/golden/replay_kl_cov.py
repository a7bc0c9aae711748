"""KL-Cov: the policy-loss hook on one micro-batch, then verl's aggregation; and which tokens each scope chooses."""

import torch
from cases import Case, actor_config, aggregate, make_tokens
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.entropy.kl_cov import PENALISED, KlCov, covariance, largest

OPTIONS = ("kl_cov_ratio", "ppo_kl_coef")


def replay(case: Case, expected: dict) -> dict:
    defaults = KlCov.Config()
    options = {name: case.param(name, getattr(defaults, name)) for name in OPTIONS}
    parts = case.param("micro_batches", None)
    return scopes(case, options, parts) if parts else loss(case, options)


def loss(case: Case, options: dict) -> dict:
    logged, config = {}, actor_config(case)
    tokens = make_tokens(
        case,
        advantages=case.tensor("advantages"),
        config=config,
        log=lambda owner, metrics, reduce: logged.update(metrics),
    )
    total = aggregate(KlCov(KlCov.Config(**options)).policy_loss(tokens), tokens.response_mask, config)
    total.backward()
    return logged | {
        "pg_loss": total.item(),
        "loss": total.item(),
        "grad_log_prob": tokens.log_probs.grad,
        "selected_mask": chosen(case, options, slice(None)),
    }


def scopes(case: Case, options: dict, parts: list[list[int]]) -> dict:
    """Chosen in each micro-batch, and once from the old log-probs (here the only ones) by the hook `observe`."""
    log_probs, mask = case.tensor("log_prob"), torch.tensor(case.input("response_mask")).bool()
    batch = Batch.from_tensors(
        uid=["1-1-0"] * len(mask),
        rm_scores=torch.zeros_like(log_probs),
        response_mask=mask,
        old_log_probs=log_probs,
        advantages=case.tensor("advantages"),
    )
    KlCov(KlCov.Config(**options, scope="batch")).observe(FakeRun(), batch)
    micro = torch.zeros_like(mask)
    for rows in parts:
        micro[rows] = chosen(case, options, rows)
    return {"selected_mask_scope_micro": micro, "selected_mask_scope_minibatch": batch.written[PENALISED]}


def chosen(case: Case, options: dict, rows) -> torch.Tensor:
    """[rows,T] bool, with the functions the hook calls."""
    mask = torch.tensor(case.input("response_mask")).bool()[rows]
    cov = covariance(case.tensor("advantages")[rows], case.tensor("log_prob")[rows], mask.double())
    flags = torch.zeros_like(mask).flatten()
    flags[largest(cov, mask, options["kl_cov_ratio"])] = True
    return flags.view_as(mask)
