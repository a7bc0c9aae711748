"""Prompt augmentation: ask a question in another format at every draw, and pay for keeping to that format.

arXiv:2602.03190 (PrAg-PO). Templates are fixed and have names. Every draw of a prompt draws one of them, uniformly and
whatever the question; all responses of the group share it. With the format reward that belongs to the template,

    R = acc + format_weight fmt,    fmt = share of the template's strings that occur exactly once in the response

and fmt = 1 for a template without such strings, which then cancels in the group. The beginning of the answer that some
templates give (`prefill`) is prompt: it is neither trained on nor looked at. Against GRPO nothing else differs; the
authors train without KL and without an entropy bonus. Nothing is remembered but the seed.

Degenerate case: groups that are all wrong can still differ in format, and then teach the format alone. Templates are
data: YAML files beside this one, and files of your own. Ours: a template that would overflow `data.max_prompt_length`
is not used for that prompt (verl would cut its instruction off), and validation has one fixed template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Plugin, Prompt, Prompts, Run, hookimpl, setting
from verl_plugins.errors import nearest

FAMILIES = Path(__file__).parent / "templates"
SINGLE_TURN = "single_turn_agent"
RANDOM, NONE = "random", "none"


@dataclass(frozen=True)
class Template:
    """One format: where its instruction stands, how the answer begins, and what must occur exactly once in it."""

    system: str | None = None
    suffix: str = ""
    prefill: str = ""
    once: tuple[str, ...] = ()


def read_templates(sources: Sequence[str]) -> dict[str, Template]:
    """Templates by name, from shipped families and YAML files.

    Raises:
        CompositionError: if a file is missing or not a mapping of templates, or two have a template of one name.
    """
    found: dict[str, Template] = {}
    for source in sources:
        shipped = FAMILIES / f"{source}.yaml"
        path = shipped if shipped.is_file() else Path(source)
        if not path.is_file():
            families = ", ".join(sorted(file.stem for file in FAMILIES.glob("*.yaml")))
            raise CompositionError(
                f"plugins.prompt_augmentation.templates has {source!r}: it is neither a file nor one of {families}"
            )
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise CompositionError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(entries, Mapping) or not entries:
            raise CompositionError(f"{path} must map names to templates, as in `mine: {{system: …}}`")
        for name, entry in entries.items():
            if name in found or name in (RANDOM, NONE):
                raise CompositionError(f"{path}: the name of template {name!r} is taken; give it another")
            found[str(name)] = _template(entry, f"{path}: {name}")
    return found


def _template(entry: Any, where: str) -> Template:
    """A template as a file writes it."""
    if not isinstance(entry, Mapping):
        raise CompositionError(f"{where} is {entry!r}: it must be a mapping, as in `mine: {{system: …}}`")
    known = [field.name for field in fields(Template)]
    for part, value in entry.items():
        if part not in known:
            raise CompositionError(f"{where}.{part} is no part of a template{nearest(str(part), known)}")
        texts = value if part == "once" and isinstance(value, list) else [value]
        if (part == "once") != isinstance(value, list) or not all(isinstance(text, str) for text in texts):
            raise CompositionError(
                f"{where}.{part} is {value!r}: it must be {'a list of texts' if part == 'once' else 'text'}"
            )
    return Template(**{**entry, "once": tuple(entry.get("once", ()))})


def render(template: Template, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Chat messages with the template's instruction in them; `messages` stay as they are.

    Raises:
        DataError: if no message is the user's, or its content is not text.
    """
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked or not isinstance(messages[asked[-1]]["content"], str):
        raise DataError("prompt_augmentation needs prompts with a user message that is plain text")
    rendered = [dict(message) for message in messages]
    rendered[asked[-1]]["content"] += template.suffix
    if template.system is None:
        return rendered
    rest = [message for message in rendered if message["role"] != "system"]
    return [{"role": "system", "content": template.system}, *rest]


def format_rewards(texts: Sequence[str], names: Sequence[str], templates: Mapping[str, Template]) -> np.ndarray:
    """[B] responses and the names of their templates -> [B] share of the template's strings that occur exactly once.

    Raises:
        DataError: if there is no template of a name.
    """
    text, names = pd.Series(texts, dtype=object), np.asarray(names, dtype=object)
    rewards = np.ones(len(text))
    for name in pd.unique(names):
        if name not in templates:
            raise DataError(f"prompt_augmentation: no template is called {name!r}")
        if once := templates[name].once:
            rows = names == name
            rewards[rows] = np.mean([text[rows].str.count(re.escape(part)) == 1 for part in once], axis=0)
    return rewards


def augmented_reward(correct: Any, format_reward: Any, format_weight: float) -> Any:
    """R = acc + format_weight fmt, [B] each."""
    return correct + format_weight * format_reward


class PromptAugmentation(Plugin):
    """Draws a template for every prompt, and adds the template's format reward."""

    name = "prompt_augmentation"
    paper = "arXiv:2602.03190"

    @dataclass
    class Config:
        templates: tuple[str, ...] = setting(
            ("default",), "families (default, deepseek, deepseek_v8) and YAML files of templates", authors=("default",)
        )
        format_weight: float = setting(1.0, "weight of the format reward beside the verifier's", authors=1.0, ge=0)
        validation: str = setting("qwen-math", "template of validation prompts: a name, random or none", authors=RANDOM)

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        return read_templates(self.config.templates)

    def check(self, config: DictConfig) -> None:
        if self.config.validation not in (*self.templates, RANDOM, NONE):
            raise CompositionError(
                f"plugins.prompt_augmentation.validation is {self.config.validation!r}: it must be {RANDOM}, {NONE} "
                f"or a template: {', '.join(self.templates)}"
            )
        rollout = config.actor_rollout_ref.rollout
        if rollout.multi_turn.enable or rollout.agent.default_agent_loop != SINGLE_TURN:
            raise CompositionError(
                "plugins.prompt_augmentation begins answers, which only single-turn rollouts allow; set "
                "actor_rollout_ref.rollout.multi_turn.enable=false and "
                f"actor_rollout_ref.rollout.agent.default_agent_loop={SINGLE_TURN}"
            )
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                "algorithm.filter_groups judges groups before plugins.prompt_augmentation has added the format reward; "
                "set algorithm.filter_groups.enable=false"
            )

    @hookimpl
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        for name, part in self._parts():
            refuse_hidden(f"prompt_augmentation: {part!r} of template {name!r}", run, part)
        names, too_long = list(self.templates), 0
        rng = run.rng("templates")
        for prompt in prompts:
            order = rng.permutation(len(names))
            too_long += self._apply_first_that_fits(run, prompt, [names[number] for number in order])
        share = pd.Series([prompt.row["format_name"] for prompt in prompts]).value_counts(normalize=True)
        run.log({"entropy_of_draw": -float((share * np.log(share)).sum()), "templates_too_long": too_long})

    @hookimpl
    def prepare_validation(self, run: Run, prompts: Prompts) -> None:
        if self.config.validation == NONE:
            return
        rng, names = run.rng("validation"), list(self.templates)
        for prompt in prompts:
            fixed = [self.config.validation]
            drawn = [names[number] for number in rng.permutation(len(names))]
            self._apply_first_that_fits(run, prompt, drawn if self.config.validation == RANDOM else fixed)

    def _apply_first_that_fits(self, run: Run, prompt: Prompt, names: Sequence[str]) -> int:
        """Give the prompt the first template that does not overflow; how many before it did."""
        refuse_other_loops("prompt_augmentation", prompt, "answers could not be begun for it")
        for too_long, name in enumerate(names):
            template = self.templates[name]
            messages = render(template, prompt.messages)
            tokens = prompt_tokens(run, messages, template.prefill)
            if tokens <= run.config.data.max_prompt_length:
                prompt.messages, prompt.prefill, prompt.row["format_name"] = messages, template.prefill, name
                return too_long
        raise DataError(
            f"prompt_augmentation: prompt {prompt.id} has {tokens} tokens with template {name!r}, and none of "
            f"{len(names)} templates fits data.max_prompt_length={run.config.data.max_prompt_length}; raise it"
        )

    @hookimpl(trylast=True)
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        """Last, because the format comes on top of whatever is the reward of the answer."""
        values = format_rewards(batch.text, batch.extra("format_name"), self.templates)
        fmt = batch.of_session(torch.from_numpy(values).float())
        batch.put("format_reward", fmt)
        batch.rewards = augmented_reward(batch.scores, fmt, self.config.format_weight)

    def _parts(self) -> Iterator[tuple[str, str]]:
        return ((name, part) for name, template in self.templates.items() for part in template.once)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        batch = batch.full
        correct, fmt, last = batch.correct.float(), batch.extra("format_reward"), batch.is_last
        groups, scores = batch.groups, batch.scores
        only_format = (groups.min(correct) == groups.max(correct)) & (groups.min(scores) < groups.max(scores))
        columns = {"acc": correct, "format": fmt, "length": batch.ends.float()}
        table = pd.DataFrame({name: values[last].numpy() for name, values in columns.items()})
        table["template"] = np.asarray(batch.extra("format_name"), dtype=object)[last.numpy()]
        of_template = table.groupby("template")
        means = {column: of_template[column].mean() for column in columns} | {"count": of_template.size()}
        run.log(
            {f"{what}/{name}": float(value) for what, series in means.items() for name, value in series.items()}
            | {
                "acc_mean": float(table["acc"].mean()),
                "format_mean": float(table["format"].mean()),
                "format_only_groups": float(groups.per_group(only_format).float().mean()),
            }
        )


def refuse_hidden(what: str, run: Run, text: str) -> None:
    """DataError if a text is not in decoded responses, which leave out special tokens; `what` says whose it is."""
    ids = run.tokenizer(text, add_special_tokens=False)["input_ids"]
    if text.strip() not in run.tokenizer.decode(ids, skip_special_tokens=True):
        raise DataError(
            f"{what} is a special token of this tokenizer and is not in decoded responses; it cannot be looked for"
        )


def refuse_other_loops(who: str, prompt: Prompt, why: str) -> None:
    """DataError if the row of a prompt names an agent loop of several turns."""
    if (name := prompt.row.get("agent_name", SINGLE_TURN)) != SINGLE_TURN:
        raise DataError(
            f"{who}: prompt {prompt.id} has agent_name {name!r}, and {why}; only {SINGLE_TURN!r} is supported"
        )


def prompt_tokens(run: Run, messages: Sequence[Mapping[str, str]], prefill: str = "") -> int:
    """Tokens that chat messages and the beginning of the answer become."""
    options = OmegaConf.select(run.config, "data.apply_chat_template_kwargs") or {}
    text = run.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    ids = [run.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prefill)]
    return sum(map(len, ids))
