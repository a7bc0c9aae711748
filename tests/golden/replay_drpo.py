"""DRPO: the driver's weights from the old policy, then the loss in the form `exact`, then verl's aggregation."""

import torch
from cases import Case, aggregate, make_tokens
from fakes import FakeRun
from omegaconf import OmegaConf

from verl_plugins import Batch
from verl_plugins.advantage.drpo import GROUP, WEIGHT, Drpo, signed_weights


def replay(case: Case, expected: dict) -> dict:
    plugin = Drpo(
        Drpo.Config(
            length_temperature=case.param("Lambda", Drpo.Config().length_temperature),
            tau=case.param("tau", Drpo.Config().tau),
            beta=case.param("beta", 1e3),
            delta=case.param("delta", 1e-4),
            kl_type=case.param("kl_type", "kl"),
            negatives="exact",
            correct_threshold=case.param("correct_threshold", None),
        )
    )
    uid, mask = [str(name) for name in case.input("uid")], torch.tensor(case.input("response_mask")).bool()
    real = torch.tensor([not name.startswith("pad") for name in uid])
    budget = case.param("max_response_length")
    run = FakeRun(config=OmegaConf.create({"data": {"max_response_length": budget}}))
    batch = batch_of([name for name in uid if not name.startswith("pad")], case, mask, real)
    advantages = on_all(plugin.estimate_advantage(run, batch), real)
    prompts = prompts_of(batch)
    found = {"advantages": advantages * prompts / len(batch), "num_questions": prompts}
    return found | (replay_loss(case, plugin, batch, advantages, real, budget) if case.has("log_prob") else {})


def batch_of(uid: list[str], case: Case, mask: torch.Tensor, real: torch.Tensor) -> Batch:
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[:, 0] = case.tensor("seq_level_rewards")
    old = case.tensor("old_log_probs")[real]
    return Batch.from_tensors(uid=uid, rm_scores=rewards[real], response_mask=mask[real], old_log_probs=old)


def on_all(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(len(real), *values.shape[1:], dtype=torch.float64)
    whole[real] = values.double()
    return whole


def replay_loss(case: Case, plugin: Drpo, batch: Batch, advantages: torch.Tensor, real: torch.Tensor, budget: int):
    info = {
        "dp_size": 1,
        "batch_num_tokens": int(batch.response_mask.sum()),
        "global_batch_size": len(batch),
        "loss_scale_factor": None,
    }
    config = OmegaConf.create({"loss_agg_mode": "seq-mean-token-sum", "global_batch_info": info})
    logged: dict[str, float] = {}
    put = {name: on_all(batch.written[name], real) for name in (GROUP, WEIGHT)}
    tokens = make_tokens(
        case,
        advantages=advantages,
        config=config,
        extra=put.__getitem__,
        log=lambda owner, metrics, reduce: logged.update(metrics),
    )
    aggregate(plugin.policy_loss(tokens), tokens.response_mask, config).backward()

    lengths = tokens.response_mask.sum(1)[real]
    scores = (tokens.log_probs.detach() * tokens.response_mask).sum(1)[real] / lengths.clamp(min=1)
    settings, right = plugin.config, plugin._right(batch)
    weights = signed_weights(right, lengths, scores, batch.groups, settings.tau, settings.length_temperature, budget)
    violation = max(logged["ppo_kl"] - settings.delta, 0)
    return {
        "grad_log_prob": tokens.log_probs.grad,
        "ppo_kl": logged["ppo_kl"],
        "constraint_coef": logged["constraint_coef"],
        "kl_active": logged["constraint_active"],
        "pos_weight": on_all(weights.clamp(min=0), real),
        "neg_weight": on_all(-weights.clamp(max=0), real),
        "pg_loss_true_objective": settings.beta / 2 * violation**2 - objective(weights, scores, batch, settings.tau),
        "pg_loss_authors_surrogate": surrogate(weights, scores, batch, settings.tau)
        + logged["constraint_coef"] * logged["ppo_kl"],
    }


def objective(weights: torch.Tensor, scores: torch.Tensor, batch: Batch, tau: float) -> float:
    """J, from the weights: log-mean-exp over the wrong responses of each mixed prompt."""
    wrong, groups = weights < 0, batch.groups
    total, count = groups.sum(torch.where(wrong, (scores / tau).exp(), 0.0)), groups.sum(wrong)
    once = groups.first(wrong)
    hard = tau * (total[once] / count[once]).log().sum()
    return float((weights.clamp(min=0) * scores).sum() - hard) / prompts_of(batch)


def surrogate(weights: torch.Tensor, scores: torch.Tensor, batch: Batch, tau: float) -> float:
    """What the authors differentiate: tau stands in the place of the logarithm."""
    mixed = int(batch.groups.first(weights < 0).sum())
    return float(tau * mixed - (weights.clamp(min=0) * scores).sum()) / prompts_of(batch)


def prompts_of(batch: Batch) -> int:
    """Those with a response that has tokens."""
    return max(len(set(batch.uid[batch.response_mask.any(1).numpy()])), 1)
