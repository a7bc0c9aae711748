"""COPO: the estimator's hook in both forms, and the loss of `form: two_losses` around verl's own."""

import numpy as np
import torch
from cases import Case, NotOffered, Rows, actor_config, aggregate, make_tokens
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.advantage.copo import (
    GLOBAL,
    WEIGHT,
    Copo,
    answer_entropy,
    local_weight,
    prompt_return,
)
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.composition.manager import Plugins

REFUSED = ("only-zero", "only-forced", "soft-with-forced", "only-global", "no-global")
"""Gates of the authors' code that the plugin leaves out."""
GATES = {"soft-with-zero": "soft-with-zero", "only-soft": "soft"}


def replay(case: Case, expected: dict) -> dict:
    gate = case.param("global_flg", "soft-with-zero")
    if gate in REFUSED:
        raise NotOffered(f"the gate {gate!r} is left out")
    config = Copo.Config(
        gate=GATES[gate],
        gamma=float(case.param("k", 5)),
        rho=float(case.param("b", 1)),
        reward_coefficient=case.param("reward_coef_flg", False),
        scale="std" if case.param("norm_adv_by_std_in_grpo", True) else "none",
        epsilon=case.param("epsilon", 1e-6),
        form="two_losses",
    )
    return replay_loss(case, config) if case.has("log_prob") else replay_advantage(case, config, expected)


def replay_advantage(case: Case, config: Copo.Config, expected: dict) -> dict:
    rows = Rows(case)
    given = np.array(case.input("extract_answer"), dtype=object)[rows.real.numpy()]
    plain = rows.batch
    batch = Batch.from_tensors(
        uid=plain.uid,
        session=plain.session,
        turn=plain.turn,
        rm_scores=plain.rewards,
        response_mask=plain.response_mask,
        extra_fields=[{"reward_extra_info": {"answer": answer}} for answer in given],
    )
    plugin = Copo(config)
    local = plugin.estimate_advantage(FakeRun(), batch)
    blended = Copo(Copo.Config(**{**vars(config), "form": "blended"})).estimate_advantage(FakeRun(), batch)
    entropy = answer_entropy(plugin.answers(batch), batch.groups)
    alone = batch.scores / (1 + config.epsilon) if config.scale == "std" else batch.scores
    weight = batch.written[WEIGHT]
    # Of the blend only the local share is 0 where a response is alone.
    shared = rows.with_lone(local, alone, expected, "advantages")[rows.real].float() - local
    return {
        "advantages": rows.with_lone(local, alone, expected, "advantages"),
        "blended_advantages": rows.on_all(blended + weight[:, None] * shared),
        "global_adv": rows.on_all(batch.to_tokens(batch.written[GLOBAL])),
        "local_weight": rows.on_all(batch.written[WEIGHT]),
        "reward_entropy": rows.on_all(entropy),
        "global_rewards": rows.on_all(
            prompt_return(batch.groups.mean(batch.scores), entropy, batch.groups, config.reward_coefficient)
        ),
    }


def replay_loss(case: Case, config: Copo.Config) -> dict:
    weight = local_weight(
        case.tensor("reward_entropy"), case.tensor("local_reward"), config.gamma, config.rho, config.gate
    )
    across = case.tensor("global_adv")
    per_row = across.gather(1, across.abs().argmax(1, keepdim=True))[:, 0]
    actor = actor_config(case)
    tokens = make_tokens(
        case,
        advantages=case.tensor("advantages"),
        config=actor,
        extra={GLOBAL: per_row, WEIGHT: weight}.__getitem__,
    )
    plugins = Plugins([Copo(config)])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    loss = aggregate(plugins.hook.policy_loss(tokens=tokens), tokens.response_mask, actor)
    loss.backward()
    assert torch.equal(across, per_row[:, None] * tokens.response_mask), "a global advantage per response is expected"
    return {"pg_loss": loss.item(), "grad_log_prob": tokens.log_probs.grad, "local_weight": weight}
