"""Which methods on entropy go together: one policy loss, any number of wrappers, terms and advantages around it."""

from __future__ import annotations

from itertools import combinations

import pytest

from verl_plugins import CompositionError
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose

LOSSES = ("clip_cov", "kl_cov", "drpo")
"""The plugins that give the policy loss of a run; all others wrap it, or add terms."""
KL_LOSS = ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0.01")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("vade+steer", ()),
        ("steer", KL_LOSS),
        ("steer+kl_cov", ()),
        ("clip_cov", ("+plugins.steer.map=exp",)),
        ("clip_cov", (*KL_LOSS, "+plugins.epo.min_ratio=0.5", "actor_rollout_ref.actor.entropy_coeff=0.001")),
        ("epo", ("+plugins.steer.map=linear", "+plugins.dcpo.entropy_base=0.5")),
        ("epo", ("plugins.epo.smooth_form=mask_pg", "+plugins.steer.map=exp", "+plugins.kl_cov.scope=batch")),
        ("vade+dcpo", ()),
        ("kl_cov+dcpo", ()),
        ("steer+entropy_law", KL_LOSS),
        ("clip_cov+entropy_law", ()),
    ],
)
def test_go_together(recipe, overrides):
    needs.check(compose(recipe, "cpu", overrides))


@pytest.mark.parametrize("pair", combinations(LOSSES, 2), ids="+".join)
def test_two_policy_losses_are_refused_by_name(pair, sentence):
    one, other = pair
    with pytest.raises(CompositionError) as error:
        needs.check(compose(one, "cpu", [f"+plugins.{other}={{}}"]))
    sentence(error.value, f"'{one}'", f"'{other}'", "policy_loss", "leave one out")
