"""Plugins that act on the value model: there is one, it has as many heads as one of them asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_plugins.composition import critic
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import CompositionError
from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin

HEADS = "critic.model.override_config.num_value_heads"


@pytest.mark.parametrize("heads", [2, 5])
def test_the_model_is_told_its_heads(run, heads):
    composed = run("ravl", f"plugins.ravl.members={heads}")
    assert OmegaConf.select(composed.config, HEADS) == heads


def test_one_head_is_verls_model(run):
    assert OmegaConf.select(run("ravl", "plugins.ravl.members=1").config, HEADS) is None


def test_no_value_model(refused):
    refused(
        "ravl",
        "algorithm.adv_estimator=grpo",
        parts=("'ravl'", "needs values"),
        mended=("algorithm.adv_estimator=gae",),
    )
    refused("ravl", "critic.enable=false", parts=("'ravl'", "critic.enable=False"))


def test_an_estimator_that_takes_no_values(refused):
    asked = ("algorithm.adv_estimator=rloo", "critic.enable=true")
    refused("ravl", *asked, parts=("algorithm.adv_estimator=rloo",), mended=("algorithm.adv_estimator=gae",))


@pytest.mark.parametrize("other", ["copo", "mc_grpo"])
def test_another_estimator_beside_it(refused, other):
    asked = "algorithm.adv_estimator=gae"
    refused(f"{other}+ravl", asked, parts=(asked, f"'{other}'"), mended=(f"~plugins.{other}",))
    refused(f"{other}+ravl", "algorithm.adv_estimator=grpo", parts=("'ravl' needs values",))


@pytest.mark.parametrize("heads", [0, -1, 1.5, 1001])
def test_impossible_heads(refused, heads):
    refused("ravl", f"plugins.ravl.members={heads}", parts=("plugins.ravl.members",))


def test_adapters(refused):
    refused("ravl", "critic.model.lora_rank=8", parts=("5 heads", "adapters"), mended=("critic.model.lora_rank=0",))


def test_a_loss_that_is_summed_over_a_response(refused):
    asked = ("critic.loss_agg_mode=seq-mean-token-sum", "plugins.ravl.eta=0.5")
    refused("ravl", *asked, parts=("plugins.ravl.eta=0.5",), mended=("critic.loss_agg_mode=token-mean",))
    refused("ravl", *asked, parts=("seq-mean-token-sum",), mended=("plugins.ravl.eta=0",))


def settings(**changed):
    model = {"override_config": {}, "lora_rank": 0}
    asked = {
        "algorithm": {"adv_estimator": "gae"},
        "critic": {"enable": None, "strategy": "fsdp", "model": model, **changed},
    }
    return OmegaConf.create(asked)


class Headed(Plugin):
    """Three heads."""

    name = "headed"
    value_heads = 3


class AlsoHeaded(Headed):
    """Three more."""

    name = "also_headed"


class Losing(Plugin):
    """A loss of its own."""

    name = "losing"

    @hookimpl
    def value_loss(self, values):
        return values.returns


def test_two_that_give_heads(sentence):
    config = SimpleNamespace()
    with pytest.raises(CompositionError) as error:
        critic.check(settings(), Plugins([Headed(config), AlsoHeaded(config)]))
    sentence(error.value, "'headed'", "'also_headed'", "~plugins.also_headed")


def test_heads_outside_of_fsdp(sentence):
    with pytest.raises(CompositionError) as error:
        critic.check(settings(strategy="megatron"), Plugins([Headed(None)]))
    sentence(error.value, "'headed'", "critic.strategy", "'megatron'", "fsdp2")


def test_a_loss_without_a_value_model(sentence):
    with pytest.raises(CompositionError) as error:
        critic.check(settings(enable=False), Plugins([Losing(None)]))
    sentence(error.value, "'losing'", "stage value_loss", "algorithm.adv_estimator=gae")
    critic.check(settings(), Plugins([Losing(None)]))
