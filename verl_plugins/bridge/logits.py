"""Where the stage `shape_logits` acts: a hook on each module that evaluates the policy, on all sides of a run.

Actor and reference have it in the actor workers, the Transformers server in its own process, and the preset `cpu` on
the model it warms up. What is computed from logits follows: log-probs, entropy, sampled tokens. No verl in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from verl_plugins.bridge.defaults import LogitsDefaults
from verl_plugins.composition import manager
from verl_plugins.composition.blame import crossing
from verl_plugins.composition.manager import Plugins

STAGE = "shape_logits"
DEFAULT = "the model"
"""Under this name the stage's default is registered, beside those of other stages."""


def shaping(section: Mapping[str, Any]) -> Plugins:
    """The plugins of a run that shape logits, and no others."""
    acting = {name for name, _ in manager.build(section).of_stage(STAGE)}
    return manager.build({name: settings for name, settings in section.items() if name in acting})


def shape(plugins: Plugins, *modules: torch.nn.Module) -> None:
    """Have the plugins shape the logits of causal language models, once per process; without such a plugin, nothing."""
    if not plugins.implements(STAGE):
        return
    plugins.add_fallback(LogitsDefaults(), DEFAULT)

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        with crossing():
            output.logits = plugins.hook.shape_logits(logits=output.logits)
        return output

    for module in modules:
        module.register_forward_hook(hook)
