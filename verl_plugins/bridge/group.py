"""One group of responses to one draw of a prompt: its sessions, and what a plugin samples, continues and asks aside."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.agent_loop_tq import apply_greedy_sampling_params

from verl_plugins.bridge.loops import CUT_OFF, listen
from verl_plugins.bridge.queue import prompt_id_of
from verl_plugins.bridge.rows import MAX_TOKENS, ROLLOUT_N
from verl_plugins.diagnostics.budget import Account
from verl_plugins.errors import DataError
from verl_plugins.services import Generated, Prompt, Rollout

ASIDE = 1
"""Part of the seeds of what a plugin asks aside from the group."""
PREFIX = "__prefix__"
"""Column of a session that continues a response: the tokens it continues."""


@dataclass
class Session:
    """One session's outputs, scored, with the row they belong to."""

    outputs: list[Any]
    columns: dict[str, Any]


class Group:
    """The group being generated for one draw of a prompt."""

    def __init__(self, worker: Any, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool) -> None:
        rollout = worker.config.actor_rollout_ref.rollout
        self.validate = trajectory["validate"]
        self.size = int(prompt.get(ROLLOUT_N, rollout.val_kwargs.n if self.validate else rollout.n))
        do_sample = prompt.pop("__do_sample__", True)
        self._worker, self._row, self._trajectory, self._trace = worker, prompt, trajectory, trace
        self._params = dict(sampling_params)
        if not self.validate and not do_sample:
            apply_greedy_sampling_params(self._params)
        if MAX_TOKENS in prompt:
            self._params["max_tokens"] = int(prompt[MAX_TOKENS])
        self.limit = int(self._params.get("max_tokens") or worker.config.data.max_response_length)
        """Tokens that a response can have."""
        self._started = self._asked = 0
        self.failed = 0
        """Sessions that failed one by one."""
        self.account = Account()
        """All that was generated for this draw, whatever becomes of it."""

    @property
    def prompt(self) -> Prompt:
        return Prompt(prompt_id_of(self._row["uid"]), self._row)

    @property
    def step(self) -> int:
        return int(self._row["global_steps"])

    async def sample(
        self,
        n: int | None = None,
        *,
        messages: list[dict[str, str]] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        prefix: Sequence[int] = (),
    ) -> list[Rollout]:
        """Roll out and score `n` more sessions (the group's size) without publishing them; failed ones are missing.

        With a `prefix` they continue a response after these tokens, which stand before theirs in `response_ids` and
        are scored with them; `max_tokens` counts what is new, by default all that the response has room for.

        Raises:
            DataError: the response has no room for another token.
        """
        room = self.limit - len(prefix)
        if room < 1 or (prefix and max_tokens is not None and max_tokens > room):
            raise DataError(f"sample: {len(prefix)} tokens of prefix leave room for {room} of {self.limit}")
        limit = max_tokens if not prefix else max_tokens or room
        changes = {"temperature": temperature, "max_tokens": limit}
        params = {key: value for key, value in changes.items() if value is not None}
        row: dict[str, Any] = {} if messages is None else {"raw_prompt": messages}
        sessions = await self.sessions(n or self.size, params, row | ({PREFIX: list(prefix)} if prefix else {}))
        return [self._rollout(session) for session in sessions]

    async def generate(
        self,
        messages: list[dict[str, str]],
        n: int = 1,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[Generated]:
        """`n` answers of the current policy to other messages, neither scored nor published.

        Raises:
            DataError: if the messages and `max_tokens` do not fit the prompt and response length together.
        """
        rollout, loop = self._worker.rollout_config, self._worker.single_turn()
        ids = await asyncio.to_thread(loop.continuous_token_builder.build_initial_tokens, messages)
        limit, room = max_tokens or self.limit, rollout.prompt_length + rollout.response_length
        if len(ids) + limit > room:
            raise DataError(
                f"run.generate: {len(ids)} tokens of prompt and max_tokens={limit} are more than "
                f"data.max_prompt_length and data.max_response_length together ({room})"
            )
        params = {**self._params, "max_tokens": limit}
        if temperature is not None:
            params["temperature"] = temperature
        first, self._asked = self._asked, self._asked + n

        async def one(number: int) -> Generated:
            own = {self._worker.seed_name: self._seed(number, ASIDE)} if self._worker._seeded else {}
            output = await loop.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=ids, sampling_params={**params, **own}
            )
            text = self._worker.tokenizer.decode(output.token_ids, skip_special_tokens=True)
            return Generated(list(output.token_ids), list(output.log_probs or []), text)

        answers = await asyncio.gather(*[one(number) for number in range(first, first + n)])
        self.account.add([len(answer.token_ids) for answer in answers])
        return list(answers)

    async def sessions(
        self, n: int, params: Mapping[str, Any] | None = None, row: Mapping[str, Any] | None = None
    ) -> list[Session]:
        """`n` scored sessions; the exceptions of failed ones are logged."""
        first, self._started = self._started, self._started + n
        wanted = {**self._params, **(params or {})}
        results = await asyncio.gather(*[self._one(number, wanted, row or {}) for number in range(first, first + n)])
        for error in (result for result in results if isinstance(result, BaseException)):
            agent_loop_tq.logger.error(f"a session of prompt {self._row['uid']} failed", exc_info=error)
            self.failed += 1
            self._worker.failures.note(error, called(self._row, self.validate))
        sessions = [result for result in results if isinstance(result, Session)]
        self.account.add([sum(sum(output.response_mask) for output in session.outputs) for session in sessions])
        return sessions

    async def _one(self, number: int, wanted: Mapping[str, Any], row: Mapping[str, Any]) -> Session | BaseException:
        """What it raises is its result: left to the task, `sys.exit` would end the event loop."""
        listen()
        try:
            return await self._run(number, dict(wanted), row)
        except BaseException as error:
            return error

    def _run(self, number: int, params: dict[str, Any], row: Mapping[str, Any]) -> Any:
        if self._worker._seeded:
            params[self._worker.seed_name] = self._seed(number)
        room = int(params.get("max_tokens") or self.limit)
        asked = {ROLLOUT_N: self.size, MAX_TOKENS: len(row.get(PREFIX, ())) + room}
        columns = {**self._row, **asked, **row}
        return self._worker._run_agent_loop(
            params, trajectory=self._trajectory, trace=self._trace, session_id=number, **columns
        )

    def _seed(self, number: int, *apart: int) -> int:
        """The same for the same draw in another run of the same seed, whatever order requests arrive in."""
        seed = self._worker.rollout_config.seed
        key = [seed, self.step, _number(self._row["index"]) if self.validate else self.prompt.id, int(self.validate)]
        return int(np.random.SeedSequence([*key, number, *apart]).generate_state(1, np.uint32)[0])

    def _rollout(self, session: Session) -> Rollout:
        last = session.outputs[-1]
        info = dict(last.extra_fields.get("reward_extra_info", {}))
        tokenizer = self._worker.tokenizer
        verdict = float(info.get("acc", last.reward_score))
        return Rollout(
            text=tokenizer.decode(last.response_ids, skip_special_tokens=True),
            response_ids=list(last.response_ids),
            score=float(last.reward_score),
            correct=verdict >= 0.5,
            truncated=last.extra_fields[CUT_OFF],
            info=info,
            outputs=session,
            log_probs=list(last.response_logprobs or []),
            mask=list(last.response_mask),
        )


def called(row: Mapping[str, Any], validate: bool) -> str:
    """A prompt in a message."""
    return f"validation prompt {row.get('index')}" if validate else f"prompt {prompt_id_of(row['uid'])}"


def _number(index: Any) -> int:
    """A part of a seed for a validation prompt, whose `extra_info.index` can be a number or any name."""
    if isinstance(index, (int, np.integer)) and index >= 0:
        return int(index)
    return int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=4).digest(), "big")


class GroupRun:
    """The run as `rollout_group` sees it in an agent-loop worker: settings, step, randomness, metrics, the policy."""

    def __init__(self, config: Any, group: Group) -> None:
        self.config, self.step, self.generate = config, group.step, group.generate
        self._group = group
        self.metrics: dict[str, float] = {}
        self._owner = ""

    def scoped(self, owner: str) -> GroupRun:
        """The same run in the hands of plugin `owner`."""
        other = object.__new__(GroupRun)
        other.__dict__.update(self.__dict__, _owner=owner)
        return other

    @property
    def tokenizer(self) -> Any:
        return self._group._worker.tokenizer

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics; they appear as `plugins/<plugin>/<key>`, averaged over the groups of the step."""
        self.metrics.update({f"plugins/{self._owner}/{key}": float(value) for key, value in metrics.items()})

    def rng(self, name: str = "") -> np.random.Generator:
        """This plugin's generator for this draw, seeded by (run seed, step, prompt, plugin, name)."""
        key = [self._group._worker.rollout_config.seed, self.step, self._group.prompt.id]
        return np.random.default_rng([*key, *f"{self._owner}/{name}".encode()])
