"""The stage `shape_logits` on a model: every side sees the same, and what is wrong in it is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_plugins import Plugin, PluginError, hookimpl
from verl_plugins.bridge.logits import shape, shaping
from verl_plugins.bridge.serving import ServesRollouts
from verl_plugins.composition import outcome
from verl_plugins.composition.manager import Plugins
from verl_plugins.cpu.generation import Request, generate
from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.cpu.rollout import TransformersServer
from verl_plugins.optim.stablemax import StableMax, symlog

SECTION = {"grpo": {}, "stablemax": {"allow_pretrained": False}, "saturation": {}}
IDS = torch.arange(5, 12)[None]


def stablemax() -> StableMax:
    return StableMax(StableMax.Config())


class Halving(Plugin):
    name = "halving"

    @hookimpl(wrapper=True)
    def shape_logits(self, logits):
        return (yield) / 2


class Silent(Plugin):
    name = "silent"

    @hookimpl
    def shape_logits(self, logits):
        return None


class Shortening(Plugin):
    name = "shortening"

    @hookimpl
    def shape_logits(self, logits):
        return logits[..., 1:]


def logits(*plugins: Plugin) -> torch.Tensor:
    model = make_model().eval()
    shape(Plugins(plugins, check=outcome.check), model)
    return model(IDS).logits


def plain() -> torch.Tensor:
    return make_model().eval()(IDS).logits


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [
        ((), lambda z: z),
        ((stablemax(),), symlog),
        ((Halving(None),), lambda z: z / 2),
        ((Halving(None), stablemax()), lambda z: symlog(z) / 2),
        ((stablemax(), Halving(None)), lambda z: symlog(z) / 2),
        ((Silent(None),), lambda z: z),
    ],
    ids=lambda value: "-".join(one.name for one in value) if isinstance(value, tuple) else "",
)
def test_what_a_model_gives(plugins: tuple[Plugin, ...], expected: Any) -> None:
    assert torch.equal(logits(*plugins), expected(plain()))


def test_gradients_reach_the_weights() -> None:
    model = make_model()
    shape(Plugins([stablemax()]), model)
    model(IDS).logits.log_softmax(-1)[..., 0].sum().backward()
    assert float(model.lm_head.weight.grad.abs().sum()) > 0


def test_what_is_wrong_is_named(sentence) -> None:
    with pytest.raises(PluginError) as error:
        logits(Shortening(None))
    sentence(error.value, "shape_logits returned shape (1, 7, 258)", "(1, 7, 259)", "plugin 'shortening'")


def test_of_a_section_those_that_shape() -> None:
    assert [plugin.name for plugin in shaping(SECTION)] == ["stablemax"]
    assert len(shaping({"grpo": {}})) == 0


def test_a_shaped_server_samples_from_and_reports_what_the_actor_computes() -> None:
    server, actor, tokenizer = make_model().eval(), make_model().eval(), make_tokenizer()
    for model in (server, actor):
        shape(Plugins([stablemax()]), model)
    prompt = IDS[0].tolist()
    requests = [
        Request(prompt, 12, temperature=temperature, seed=seed) for temperature in (1.0, 0.5) for seed in (1, 2)
    ]
    for request, done in zip(requests, generate(server, tokenizer, requests), strict=True):
        whole = torch.tensor([prompt + done.token_ids])
        told = symlog(make_model().eval()(whole).logits[0, len(prompt) - 1 : -1]) / request.temperature
        ours = (actor(whole).logits[0, len(prompt) - 1 : -1] / request.temperature).log_softmax(-1)
        assert torch.equal(ours, told.log_softmax(-1))
        expected = ours.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.log_probs), expected.detach(), atol=1e-4, rtol=0)


class Server:
    """What the trainer holds of a server."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.set_plugins = SimpleNamespace(remote=self.given.append)


@pytest.mark.parametrize(("plugins", "told"), [([stablemax()], 1), ([Halving(None)], 1), ([], 0)])
def test_every_server_is_told_where_plugins_shape_logits(plugins, told, monkeypatch) -> None:
    monkeypatch.setattr("verl_plugins.bridge.serving.ray.get", lambda calls: calls)
    trainer, servers = object.__new__(ServesRollouts), [Server(), Server()]
    trainer.plugins = Plugins(plugins)
    trainer.llm_server_manager = SimpleNamespace(server_handles=servers)
    trainer._shape_served_logits(SECTION)
    assert [server.given for server in servers] == [[SECTION] * told] * 2


def test_the_server_builds_them(monkeypatch) -> None:
    import asyncio

    asked = []

    def build(section: Any, role: str) -> Plugins:
        asked.append((section, role))
        return Plugins([stablemax()])

    monkeypatch.setattr("verl_plugins.cpu.rollout.census.build", build)
    server = object.__new__(TransformersServer)
    server.model = make_model().eval()
    asyncio.run(server.set_plugins(SECTION))
    assert asked == [(SECTION, "rollout server")]
    assert torch.equal(server.model(IDS).logits, symlog(plain()))
