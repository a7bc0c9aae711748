"""SAGE: where a whole group fails, roll it out again with a hint that the policy makes itself from the solution.

arXiv:2602.03143. Level 0 is the plain prompt, levels 1 to 3 are hints of rising help. For every prompt drawn:

    roll out the plain group; if no response is right, ask the policy for an object with the three hints, given problem
    and worked solution (read tolerantly, at most `hint_attempts` times); for each level that has a text: roll out a
    new group from prompt and hint, which replaces the old one, until one response is right

and the group of the last level tried is trained on. The reward is unchanged. Everything downstream is conditioned on
prompt and hint: the hint is in the prompt that is stored, and the paper's ablation shows that leaving it out there is
worse. Hint tokens are never trained on, and validation has no hints. Against GRPO nothing else differs.

Variant `sage-light` rolls out once: the level comes from the prompt's last visit, one up at an accuracy of
`raise_at_or_below` or less, one down above `lower_above`; a hint that fails is replaced by the prompt's last good one.

Degenerate cases: without a hint the failed plain group stays, and has no advantage; a hint that does not fit the prompt
length counts as missing. Ours, where the authors' code has slips: an object is found wherever it stands in the answer,
and groups are those of one draw. Hints are sampled at `hint_temperature`; theirs were greedy, and so were retries.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyjson5
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from verl_plugins import (
    Batch,
    CompositionError,
    DataError,
    Plugin,
    Prompt,
    Prompts,
    Rollout,
    Run,
    StateError,
    hookimpl,
    setting,
)
from verl_plugins.sampling.prompt_augmentation import prompt_tokens
from verl_plugins.sampling.vade import evidence

LEVELS = 3
REASONED = "</think>"
WORD, SURROGATE = re.compile(r"\w"), re.compile("[\ud800-\udfff]")
LATEX = re.compile(r"""(\\[\\"'/\n]|\\u[0-9a-fA-F]{4}|\\n(?!abla|eq\b|ot(?:in)?\b)|\\[bfrt](?![a-z]))|\\""")
"""A backslash that begins an escape of JSON (group 1), or else one that was written for LaTeX, as in \\theta."""
Messages = list[dict[str, Any]]


WORDING = Path(__file__).with_suffix(".yaml")


def read_wording(path: Path) -> dict[str, Template]:
    """What is said to the policy: `tutor`, `request` (with $problem and $solution), `hint` (with $hint).

    Raises:
        CompositionError: if the file does not have just these texts with these names in them.
    """
    texts = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    names = {"tutor": set(), "request": {"problem", "solution"}, "hint": {"hint"}}
    found = {name: Template(str(text)) for name, text in (texts if isinstance(texts, Mapping) else {}).items()}
    if found.keys() != names.keys() or any(set(_names(found[name])) != names[name] for name in names):
        raise CompositionError(
            f"plugins.sage.wording={str(path)!r} must be a YAML file of tutor, request (with $problem and $solution) "
            "and hint (with $hint); any other dollar sign is written $$"
        )
    return found


def _names(template: Template) -> list[str]:
    found = template.pattern.finditer(template.template)
    return [match["named"] or match["braced"] or "" for match in found if not match["escaped"]]


def hint_text(payload: Mapping[str, Any] | None, level: int) -> str | None:
    """The text of a level; None where it is missing, without a word ("..."), or no text that can be tokenized."""
    text = (payload or {}).get(f"level_{level}")
    return text if isinstance(text, str) and WORD.search(text) and not SURROGATE.search(text) else None


def parse_hint(answer: str) -> dict[str, Any] | None:
    """The first object in an answer, behind its reasoning, that has the text of a level; None if there is none.

    Fences and prose around it, single quotes, trailing commas, raw line breaks and LaTeX's backslashes are borne.
    """
    answer = LATEX.sub(lambda match: match[1] or r"\\", answer.rpartition(REASONED)[2])
    for brace in re.finditer(r"\{", answer):
        found = _object_at(answer, brace.start())
        if isinstance(found, dict) and any(hint_text(found, level) for level in range(1, LEVELS + 1)):
            return found
    return None


def _object_at(text: str, start: int) -> Any:
    """JSON or JSON5 that begins there, whatever follows it; None if none does."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        pass
    try:
        return pyjson5.loads(text[start:])
    except pyjson5.Json5ExtraData as error:
        return error.result
    except pyjson5.Json5Exception:
        return None


def next_level(
    level: np.ndarray, accuracy: np.ndarray, max_level: int, raise_at_or_below: float, lower_above: float
) -> np.ndarray:
    """sage-light: level and accuracy of the last visit [N], level -1 for none -> level to ask at [N].

    The thresholds are exchanged if the first is the larger.
    """
    low, high = sorted((raise_at_or_below, lower_above))
    moved = np.where(accuracy <= low, level + 1, np.where(accuracy > high, level - 1, level))
    return np.where(level < 0, 0, moved.clip(0, max_level))


def question_of(messages: Messages) -> str:
    """Text of the last user message."""
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def with_hint(messages: Messages, text: str) -> Messages:
    """The prompt with a text behind its last user message; other content and messages stay."""
    place = max(number for number, message in enumerate(messages) if message["role"] == "user")
    content = messages[place]["content"]
    content = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]


class Sage(Plugin):
    """Hints for groups that failed, from the policy itself."""

    name = "sage"
    paper = "arXiv:2602.03143"

    @dataclass
    class Config:
        variant: str = setting(
            "sage", "escalate within the step, or one rollout a visit", authors="sage", choices=("sage", "sage-light")
        )
        max_level: int = setting(3, "highest level of hints", authors=3, ge=0, le=LEVELS)
        hint_attempts: int = setting(3, "requests for hints until one can be read", authors=3, ge=1)
        hint_temperature: float = setting(1.0, "temperature of hints", authors=0.0, ge=0)
        hint_max_tokens: int = setting(1024, "tokens of an answer with hints, all levels together", ge=1)
        raise_at_or_below: float = setting(
            0.1, "sage-light: one level up at this accuracy or less", authors=0.1, ge=0, le=1
        )
        lower_above: float = setting(0.35, "sage-light: one level down above this accuracy", authors=0.35, ge=0, le=1)
        wording: str | None = setting(None, "YAML file of what is said to the policy; default: texts of this package")
        answer_as_solution: bool = setting(False, "take the final answer where there is no worked solution")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.level = np.zeros(0, dtype=np.int64)
        """[N] level of the last visit, -1 before the first; sized on first use."""
        self.accuracy = self.right = self.asked = np.zeros(0)
        """[N] accuracy of the last visit; right and all responses of all visits."""
        self.hints: dict[str, str] = {}
        """sage-light: the last good hints of a prompt id, as JSON."""

    @functools.cached_property
    def wording(self) -> dict[str, Template]:
        return read_wording(Path(self.config.wording) if self.config.wording else WORDING)

    def check(self, config: DictConfig) -> None:
        self.wording  # noqa: B018  refuses a file that cannot be used
        data, most = config.data, self.config.hint_max_tokens
        if most >= data.max_prompt_length + data.max_response_length:
            raise CompositionError(
                f"plugins.sage.hint_max_tokens={most} leaves no room for a request in data.max_prompt_length="
                f"{data.max_prompt_length} and data.max_response_length={data.max_response_length} together; set it "
                "lower, so that problem, solution and answer fit"
            )
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                "plugins.sage gives failed groups another chance, and algorithm.filter_groups throws groups away; set "
                "algorithm.filter_groups.enable=false"
            )
        model = OmegaConf.select(config, "reward.reward_model") or {}
        if model.get("enable") and not model.get("enable_resource_pool"):
            raise CompositionError(
                "plugins.sage must know rewards while it rolls out, and a reward model without resources of its own "
                "scores afterwards; set reward.reward_model.enable_resource_pool=true"
            )

    # Driver

    @hookimpl(tryfirst=True)
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        """First, because the hints are for the question of the dataset, whatever others make of the prompt."""
        self._prepare(len(run.dataset))
        config, ids = self.config, [prompt.id for prompt in prompts]
        visits = self.level[ids], self.accuracy[ids]
        wanted = next_level(*visits, config.max_level, config.raise_at_or_below, config.lower_above)
        if config.variant == "sage":
            wanted = np.zeros_like(wanted)
        for prompt, level in zip(prompts, wanted.tolist(), strict=True):
            self._solution(prompt)
            question, last = question_of(prompt.messages), self.hints.get(str(prompt.id), "")
            prompt.row |= {"hint_level": level, "hint_used": 0, "hint_question": question, "hints": last}

    def _solution(self, prompt: Prompt) -> str:
        if prompt.solution:
            return prompt.solution
        if self.config.answer_as_solution:
            return str(prompt.row["reward_model"]["ground_truth"])
        raise DataError(
            f"sage: prompt {prompt.id} has no worked solution (`solution` in extra_info) to make hints from; add them "
            "to the data, or set plugins.sage.answer_as_solution=true for poorer hints that may give it away"
        )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        self._prepare(len(run.dataset))
        batch = batch.full
        ids, correct, n = evidence(batch, None, 0.5)
        self.right[ids] += correct
        self.asked[ids] += n
        draws = batch.groups.first(torch.ones(len(batch), dtype=torch.bool)).numpy().nonzero()[0]
        draws = draws[np.lexsort(np.array([uid.split("-") for uid in batch.uid[draws]]).astype(int).T[::-1])]
        # Of several draws of a prompt the last one stays, level and accuracy both.
        drawn, level = batch.prompt_id.numpy()[draws], np.asarray(batch.extra("hint_used"), dtype=np.int64)[draws]
        accuracy = batch.groups.mean(batch.correct.double()).numpy()[draws]
        self.level[drawn], self.accuracy[drawn] = level, accuracy
        if self.config.variant == "sage-light":
            hints = batch.extra("hints")
            self.hints |= {str(batch.prompt_id[row].item()): hints[row] for row in draws if hints[row]}
        self._log_levels(run, level, accuracy)

    def _log_levels(self, run: Run, level: np.ndarray, accuracy: np.ndarray) -> None:
        """Final levels of the step's prompts and accuracy at each; mean reward over all visits, by fifths."""
        counts = np.bincount(level, minlength=LEVELS + 1)
        sums = np.bincount(level, accuracy, minlength=LEVELS + 1)
        seen = self.asked > 0
        mean = self.right[seen] / self.asked[seen]
        bucket = np.where(mean == 0, 0, np.where(mean == 1, 6, 1 + np.floor(5 * mean)))
        shares = np.bincount(bucket.astype(int), minlength=7) / len(bucket)
        run.log({f"level_{k}": count / len(level) for k, count in enumerate(counts)})
        run.log({f"acc_level_{k}": sums[k] / counts[k] for k in np.flatnonzero(counts)})
        run.log({f"mean_reward_bucket_{k}": share for k, share in enumerate(shares)})

    # Agent-loop workers

    @hookimpl
    async def rollout_group(
        self, run: Run, prompt: Prompt, sample: Callable[..., Awaitable[list[Rollout]]]
    ) -> list[Rollout]:
        if self.config.variant == "sage-light":
            return await self._at_level(run, prompt, sample, prompt.row["hint_level"])
        rollouts = await sample()
        solved = not rollouts or _solved(rollouts)
        run.log({"needing_hint": not solved})
        if not solved:
            rollouts = await self._escalate(run, prompt, sample, rollouts)
        return rollouts

    async def _escalate(self, run: Run, prompt: Prompt, sample: Callable, plain: list[Rollout]) -> list[Rollout]:
        """Groups of rising level until one has a right response; the last one that came back."""
        payload = await self._ask_hints(run, prompt) if self.config.max_level else None
        rollouts, extra, too_long, shown = plain, 0, 0, []
        for level in range(1, self.config.max_level + 1):
            if _solved(rollouts) or not (text := hint_text(payload, level)):
                continue
            messages = self._hinted(prompt, text)
            if not self._fits(run, prompt, messages):
                too_long += 1
                continue
            prompt.row["hint_used"] = level
            shown.append(text)
            tried = await sample(messages=messages)
            extra += len(tried)
            rollouts = tried or rollouts
        self._log_leak(run, prompt, shown)
        solved = _solved(rollouts)
        run.log({"rescued": solved, "still_unsolved": not solved, "extra_rollouts": extra, "hint_too_long": too_long})
        return rollouts

    async def _at_level(self, run: Run, prompt: Prompt, sample: Callable, wanted: int) -> list[Rollout]:
        """One group at the wanted level, or without a hint where there is none."""
        run.log({"needing_hint": wanted > 0})
        if not wanted:
            return await sample()
        payload, last = await self._ask_hints(run, prompt), prompt.row["hints"]
        fallback = payload is None and bool(last)
        payload = json.loads(last) if fallback else payload
        text = hint_text(payload, wanted)
        messages = self._hinted(prompt, text) if text else None
        too_long = messages is not None and not self._fits(run, prompt, messages)
        run.log({"hint_fallback": fallback, "hint_too_long": too_long})
        prompt.row["hints"] = json.dumps(payload) if payload else ""
        if messages is None or too_long:
            return await sample()
        prompt.row["hint_used"] = wanted
        self._log_leak(run, prompt, [text])
        return await sample(messages=messages)

    async def _ask_hints(self, run: Run, prompt: Prompt) -> dict[str, Any] | None:
        """Hints of all levels for one prompt; None if no answer could be read or the request would not fit."""
        config, words = self.config, self.wording
        fields = {"problem": prompt.row["hint_question"], "solution": self._solution(prompt)}
        messages = [
            {"role": "system", "content": words["tutor"].substitute()},
            {"role": "user", "content": words["request"].substitute(fields)},
        ]
        data = run.config.data
        room = data.max_prompt_length + data.max_response_length - config.hint_max_tokens
        too_long = prompt_tokens(run, messages) > room
        run.log({"hint_request_too_long": too_long})
        if too_long:
            return None
        payload, attempts, tokens = None, 0, 0
        while payload is None and attempts < config.hint_attempts:
            (answer,) = await run.generate(
                messages, temperature=config.hint_temperature, max_tokens=config.hint_max_tokens
            )
            payload, attempts, tokens = parse_hint(answer.text), attempts + 1, tokens + len(answer.token_ids)
        run.log({"hint_attempts": attempts, "hint_parse_failed": payload is None, "hint_tokens_mean": tokens})
        return payload

    def _log_leak(self, run: Run, prompt: Prompt, shown: Sequence[str]) -> None:
        """Whether the final answer stands in one of the hints that were shown, if any was."""
        if shown:
            truth = re.escape(str(prompt.row["reward_model"]["ground_truth"]))
            run.log({"answer_leak": any(re.search(rf"(?<!\w){truth}(?!\w)", text) for text in shown)})

    def _hinted(self, prompt: Prompt, hint: str) -> Messages:
        return with_hint(prompt.messages, self.wording["hint"].substitute(hint=hint.strip()))

    def _fits(self, run: Run, prompt: Prompt, messages: Sequence[Mapping[str, Any]]) -> bool:
        return prompt_tokens(run, messages, prompt.prefill) <= run.config.data.max_prompt_length

    # State

    def _prepare(self, prompts: int) -> None:
        if not len(self.level):
            self.level = np.full(prompts, -1, dtype=np.int64)
            self.accuracy, self.right, self.asked = np.zeros(prompts), np.zeros(prompts), np.zeros(prompts)
        if len(self.level) != prompts:
            raise StateError(f"sage: the saved state has {len(self.level)} prompts, the dataset {prompts}")

    def state_dict(self) -> dict[str, Any]:
        arrays = {"level": self.level, "accuracy": self.accuracy, "right": self.right, "asked": self.asked}
        return {**arrays, "hints": self.hints}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = np.array(state["level"], np.int64)
        self.accuracy, self.right, self.asked = (
            np.array(state[name], np.float64) for name in ("accuracy", "right", "asked")
        )
        self.hints = dict(state["hints"])


def _solved(rollouts: Sequence[Rollout]) -> bool:
    return any(rollout.correct for rollout in rollouts)
