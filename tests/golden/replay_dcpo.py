"""DCPO: its wrapper around given advantages, with the tempered log-probs as the forward pass; and the default loss."""

from types import SimpleNamespace

import torch
from cases import Case, actor_config, aggregate, make_tokens
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.bridge.defaults import ActorDefaults, DriverDefaults
from verl_plugins.composition.manager import Plugins
from verl_plugins.entropy.dcpo import Dcpo

OPTIONS = ("entropy_base", "temperature_high", "temperature_low", "alpha_cap", "score_threshold")


class GivenPass(FakeRun):
    """The forward pass of the case, for any of its rows."""

    def log_probs(self, batch: Batch, temperature: float | None = None) -> torch.Tensor:
        self.asked = temperature
        return torch.stack([self.rows[key] for key in batch.keys])


def replay(case: Case, expected: dict) -> dict:
    defaults = Dcpo.Config()
    options = {name: case.param(name, getattr(defaults, name)) for name in OPTIONS}
    plugin = Dcpo(Dcpo.Config(**options, entropy_source="previous_mc"))
    return loss(case, plugin) if case.has("log_prob") else advantage(case, plugin)


def advantage(case: Case, plugin: Dcpo) -> dict:
    mask = torch.tensor(case.input("response_mask")).bool()
    uid = [str(name) for name in case.input("uid")]
    real = torch.tensor([not name.startswith("pad") for name in uid])
    whole = {
        "rm_scores": case.tensor("token_level_scores"),
        "response_mask": mask,
        "old_log_probs": case.tensor("old_log_probs"),
        "prompts": torch.zeros(len(uid), 1),
        "prompt_lengths": torch.ones(len(uid)),
        "responses": torch.zeros_like(mask),
        "response_lengths": mask.sum(1),
    }
    optional = {"session": case.input("session_id", None), "turn": case.input("output_index", None)}
    places = real.nonzero()[:, 0].tolist()
    batch = Batch.from_tensors(
        uid=[uid[row] for row in places],
        **{name: values[real] for name, values in whole.items()},
        **{name: [values[row] for row in places] for name, values in optional.items() if values is not None},
    )
    run = GivenPass(config=SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(temperature=1.0))))
    run.rows = dict(zip(batch.keys, case.tensor("old_log_probs_t")[real], strict=True))
    plugin.load_state_dict({"entropy": case.param("entropy", None) or 0.0})  # null before the first update
    estimator = DriverDefaults()
    estimator.estimator = lambda: case.tensor("advantages")[real]
    plugins = Plugins([plugin])
    plugins.add_fallback(estimator)
    advantages = torch.zeros_like(whole["rm_scores"])
    advantages[real] = plugins.hook.estimate_advantage(run=run, batch=batch)
    assert getattr(run, "asked", run.metrics["temperature"]) == run.metrics["temperature"]
    return run.metrics | {"advantages": advantages * mask}


def loss(case: Case, plugin: Dcpo) -> dict:
    config = actor_config(case)
    tokens = make_tokens(case, advantages=case.tensor("advantages"), config=config)
    plugins = Plugins([plugin])
    plugins.add_fallback(ActorDefaults(lambda: 0.0))
    total = aggregate(plugins.hook.policy_loss(tokens=tokens), tokens.response_mask, config)
    total.backward()
    return {"pg_loss": total.item(), "grad_log_prob": tokens.log_probs.grad}
