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
    batch = Batch.from_tensors(
        uid=plain.uid,
        session=plain.session,
        turn=plain.turn,
        rm_scores=plain.rewards,
        response_mask=plain.response_mask,
        old_log_probs=case.tensor("old_log_probs")[rows.real],
        prompt_log_probs=case.tensor("prompt_log_probs")[rows.real],
        prompt_lengths=torch.tensor(case.input("prompt_mask")).sum(1)[rows.real] + 1,
    )
    advantages = Plugins([grpo, plugin]).hook.estimate_advantage(run=FakeRun(), batch=batch)
    return {
        "advantages": rows.on_all(advantages),
        "prompt_confidence": rows.on_all(plugin._prompt_confidence(batch)),
        "answer_confidence": rows.on_all(
            confidence(batch.old_log_probs, batch.response_mask, plugin.config.low_prob_ratio)
        ),
    }
