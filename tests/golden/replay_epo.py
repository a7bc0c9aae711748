"""EPO: the history and its field through the driver's functions, the terms and the wrapper on one micro-batch."""

import math

import torch
from cases import Case, actor_config, aggregate, make_tokens

from verl_plugins import Tokens
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.epo import GATE, REFERENCE, Epo, History, for_the_loss, left_padded, outside, phase_weight

FORMS = {"grad_log_prob": "indicator", "regularizer": "hinge", "entropy_mask": "mask_pg"}
"""An expected value that only a case of this form has; the last that is there decides."""

USUAL = Epo.Config()
"""For settings that a case leaves out."""


def replay(case: Case, expected: dict) -> dict:
    if case.has("step_entropy_lists"):
        return histories(case)
    if case.has("epoch"):
        return {
            "weight": [
                phase_weight(epoch, case.param("max_epochs", USUAL.schedule_steps)) for epoch in case.input("epoch")
            ]
        }
    form = [name for key, name in FORMS.items() if key in expected][-1]
    return losses(case, form)


def histories(case: Case) -> dict:
    lists = case.input("step_entropy_lists")
    steps = [torch.tensor([math.nan if h is None else h for h in step], dtype=torch.float64) for step in lists]
    authors, ours = History(), History()
    for step in steps:
        authors.add(left_padded(step.nan_to_num(0), case.param("max_steps")))
        ours.add(step)
    return {"entropy_history_authors": authors.means(), "entropy_history_right_aligned": ours.means()}


def losses(case: Case, form: str) -> dict:
    mask, turns = torch.tensor(case.input("response_mask")).bool(), torch.tensor(case.input("rollout_step")).long()
    turns = turns if turns.dim() == 2 else turns[:, None].expand_as(mask)  # of each token, or of the whole row
    mode = "token" if case.param("entropy_smooth_mask_mode", "token") == "token" else "sequence"
    plugin = Epo(
        Epo.Config(
            smooth_form=form,
            smooth_mode=mode,
            smooth_coeff=case.param("entropy_smooth_coeff", USUAL.smooth_coeff),
            min_ratio=case.param("entropy_smooth_min_ratio", USUAL.min_ratio),
            max_ratio=case.param("entropy_smooth_max_ratio", USUAL.max_ratio),
            out_range_penalty=case.param("entropy_smooth_out_range_penalty", USUAL.out_range_penalty),
        )
    )
    config = actor_config(case)
    config.entropy_coeff = case.param("entropy_coeff", 0.001)
    weight = phase_weight(case.param("epoch", 0), case.param("max_epochs", USUAL.schedule_steps))
    weight = weight if case.param("enable_smooth_weights", False) else 1.0
    on = case.param("entropy_smooth", True) and config.entropy_coeff
    usual = torch.tensor(case.input("entropy_history") or [0.0], dtype=torch.float64)
    sent = for_the_loss(usual, turns, mask, case.param("gate_step", 25), weight * bool(on))
    extra = dict(zip((REFERENCE, GATE), (values.double() for values in sent), strict=True))
    entropy = case.tensor("entropy").requires_grad_()
    tokens = tokens_of(case, form, config, entropy, extra, mask)
    plugins = Plugins([plugin])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    policy = aggregate(plugins.hook.policy_loss(tokens=tokens), mask, config)
    bonus = aggregate(entropy, mask, config)
    # The authors' mean of a response includes its padding, as does the size that they divide by below.
    compared = entropy if mode == "token" else entropy.detach().mean(1, keepdim=True).expand_as(entropy)
    (term,) = plugins.hook.loss_terms(tokens=tokens_of(case, form, config, compared, extra, mask)) or ({},)
    scale = config.entropy_coeff * plugin.config.smooth_coeff
    term = term["epo_smooth"] if term else torch.zeros_like(entropy)
    smooth = aggregate(term, mask, config)
    regularizer = smooth - config.entropy_coeff * bonus
    (regularizer if form == "hinge" else policy + regularizer).backward()
    band = (plugin.config.min_ratio, plugin.config.max_ratio)
    # The authors' mask has values in the padding, too.
    unmasked = extra | {REFERENCE: usual[turns.clamp(max=len(usual) - 1)]}
    everywhere = tokens_of(case, form, config, compared, unmasked, mask)
    far = outside(compared.detach(), unmasked[REFERENCE], *band)
    return {
        "policy_loss": (policy + regularizer).item(),
        "pg_loss": policy.item(),
        "entropy_loss": bonus.item(),
        "regularizer": regularizer.item(),
        "smooth_loss": smooth.item() / scale if scale else 0.0,
        "penalty": (term / scale if scale else term).detach() * mask,
        "within_band_fraction": ((1 - far) * mask).mean().item(),
        "entropy_mask": plugin.share_kept(everywhere),
        "grad_log_prob": tokens.log_probs.grad,
        "grad_entropy": entropy.grad,
    }


def tokens_of(case: Case, form: str, config, entropy: torch.Tensor, extra: dict, mask: torch.Tensor) -> Tokens:
    if form != "hinge":
        return make_tokens(
            case, advantages=case.tensor("advantages"), config=config, entropy=entropy, extra=extra.__getitem__
        )
    zeros = torch.zeros_like(entropy)
    return Tokens(
        log_probs=zeros.detach().requires_grad_(),
        old_log_probs=zeros.detach(),
        advantages=zeros.detach(),
        response_mask=mask,
        config=config,
        entropy=entropy,
        extra=extra.__getitem__,
    )
