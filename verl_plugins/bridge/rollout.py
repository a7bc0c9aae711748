"""verl's agent-loop workers with plugins in them: how one group of responses is generated, scored and published.

A group's sessions are rolled out and scored first and then written to the queue in one piece, so that nothing of a
group that is rolled again ever reaches the trainer.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import ray
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap, _agent_loop_registry
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ, apply_greedy_sampling_params

from verl_plugins.bridge import census
from verl_plugins.bridge.defaults import WorkerDefaults
from verl_plugins.bridge.failures import Executor, Failures, give_up
from verl_plugins.bridge.late import Begun
from verl_plugins.bridge.loops import (
    CUT_OFF,
    SINGLE_TURN,
    Ends,
    Listening,
    SingleTurn,
    heard,
    listen,
    refuse_long_prompts,
)
from verl_plugins.bridge.queue import prompt_id_of
from verl_plugins.bridge.rows import MAX_TOKENS, PREFILL, ROLLOUT_N, Publisher, RewardBatcher, Row, session_rows
from verl_plugins.bridge.serving import seed_name
from verl_plugins.composition.blame import told
from verl_plugins.diagnostics.budget import ACCOUNT_FIELD, Account
from verl_plugins.errors import DataError, ResultError
from verl_plugins.services import Generated, Prompt, Rollout

OWN_SINGLE_TURN = f"{SingleTurn.__module__}.{SingleTurn.__qualname__}"
ASIDE = 1
"""Part of the seeds of what a plugin asks aside from the group."""
METRICS_FIELD = "plugin_metrics"
"""Metrics logged during `rollout_group` travel to the driver in this part of a row's extra fields."""


@dataclass
class _Session:
    """One session's outputs, scored, with the row they belong to."""

    outputs: list[Any]
    columns: dict[str, Any]


class PluginAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """Generates the groups of the prompts it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plugins = census.build(OmegaConf.to_container(self.config.plugins), "agent-loop worker")
        self._seeded = self._seeds_requests()
        self.seed_name = seed_name(self.rollout_config.name)
        self._has_group_control = self.plugins.implements("rollout_group")
        self.plugins.add_fallback(WorkerDefaults())
        refuse_long_prompts()
        self._ends = Ends.of(self.rollout_config, self.model_config)
        self.llm_client = Listening(self.llm_client, self._ends)
        self._scorer = RewardBatcher(self.reward_loop_worker_handles)
        self._publisher = Publisher(by_step=self.config.trainer.v1.trainer_mode == "sync")
        self.failures, self._threads = Failures(), Executor(thread_name_prefix="agent-loop")
        self._begun = Begun()
        self._single_turn: SingleTurn | None = None

    def _seeds_requests(self) -> bool:
        """Whether every request has a seed of its own.

        On GPUs that costs vLLM and SGLang time. And where generation is interrupted, their continuation of a request
        would draw the same random numbers again.
        """
        rollout, trainer = self.rollout_config, self.config.trainer
        on_cpu = trainer.device == "cpu" and trainer.v1.trainer_mode == "sync"
        return rollout.name == "transformers" or rollout.full_determinism or on_cpu

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        """verl's entry: one prompt, all sessions of its group, its status in the queue.

        Whatever is raised, also what would end a task or its event loop (a cancellation, `sys.exit`), the status is
        stored: the driver waits for it.
        """
        uid, validate = prompt["uid"], trajectory["validate"]
        partition, rows, status, group = "val" if validate else "train", [], "failure", None
        asyncio.get_running_loop().set_default_executor(self._threads)
        try:
            group = _Group(self, prompt, sampling_params, trajectory, trace)
            self.failures.asked += group.size
            with self._begun.at(uid, _name(prompt, validate)):
                sessions = await self._generate_group(group)
            if sessions and not validate:
                sessions[0].outputs[-1].extra_fields[ACCOUNT_FIELD] = group.account.as_field()
            rows = await self._rows(sessions, validate)
            status = "finished" if sessions and len(sessions) == group.size else "failure"
        except BaseException as error:
            self._failed(error, prompt, validate, group)
        try:
            await self._publisher.publish(partition, rows, uid, status)
            self.failures.finished += status == "finished"
        except BaseException as error:
            self._failed(error, prompt, validate, group)
            try:
                await self._publisher.publish(partition, [], uid, "failure")
            except BaseException as last:
                give_up(f"the status of {_name(prompt, validate)} cannot be stored: {told(last)}")

    def _failed(self, error: BaseException, prompt: dict, validate: bool, group: _Group | None) -> None:
        """A whole group is lost: its sessions count, but for those that failed before."""
        agent_loop_tq.logger.error(f"rollout of prompt {prompt['uid']} failed", exc_info=error)
        lost = 1 if group is None else max(1, group.size - group.failed)
        self.failures.asked += group is None
        self.failures.note(error, _name(prompt, validate), lost)

    async def take_failures(self) -> Failures:
        """What failed since the driver last asked."""
        return self.failures.take()

    async def late(self, seconds: float) -> tuple[int, str, float, str] | None:
        """Prompts that have taken longer than this, as `Begun.late` says."""
        return self._begun.late(seconds)

    async def _generate_group(self, group: _Group) -> list[_Session]:
        if group.validate or not self._has_group_control:
            return await group.sessions(group.size)
        run = GroupRun(self.config, group)
        rollouts = await self.plugins.hook.rollout_group(run=run, prompt=group.prompt, sample=group.sample)
        if rollouts is None:
            return await group.sessions(group.size)
        if not rollouts and not group.failed:
            raise ResultError("rollout_group returned no rollout; None leaves the group to verl")
        group.size = len(rollouts)
        sessions = [rollout.outputs for rollout in rollouts]
        for number, session in enumerate(sessions):
            session.columns |= {"session_id": number, ROLLOUT_N: group.size}
        if run.metrics and sessions:
            sessions[0].outputs[-1].extra_fields[METRICS_FIELD] = run.metrics
        return sessions

    async def _run_agent_loop(self, sampling_params: dict, trajectory: dict, *, agent_name: str, **columns: Any) -> Any:
        """verl's own, except that its single-turn loop is set up once and copied instead of made from its settings."""
        if agent_name != SINGLE_TURN or _agent_loop_registry[SINGLE_TURN]["_target_"] != OWN_SINGLE_TURN:
            if columns.get(PREFILL):
                who = f"prompt {columns['uid']} with the agent loop {agent_name!r}"
                raise DataError(f"{who}: only {SINGLE_TURN!r} can begin answers (Prompt.prefill)")
            return await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, **columns)
        columns.pop("trace", None)
        loop = self.single_turn()
        loop.prefill = columns.get(PREFILL, "")
        output = await loop.run(sampling_params, **columns)
        return await self._agent_loop_postprocess(output, trajectory["validate"], **columns)

    def single_turn(self) -> SingleTurn:
        """A single-turn loop of its own for one request."""
        if self._single_turn is None:
            self._single_turn = SingleTurn(
                trainer_config=DictConfigWrap(config=self.config),
                server_manager=self.llm_client,
                tokenizer=self.tokenizer,
                processor=self.processor,
                hf_model_type=self.hf_model_type,
                dataset_cls=self.dataset_cls,
                data_config=DictConfigWrap(self.config.data),
                tools=ToolListWrap(self.tools),
            )
        return copy.copy(self._single_turn)

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **columns: Any) -> _Session:
        """Score a session's outputs and hand them back instead of publishing them."""
        outputs = output if isinstance(output, list) else [output]
        if not outputs:
            raise DataError("the agent loop gave no output for a session")
        cut = [self._ends.cut_off(one, heard(), int(columns[MAX_TOKENS])) for one in outputs]
        for one in outputs:
            one.extra_fields.pop(CUT_OFF, None)  # a reward function reads the extra fields with the dataset's columns
            self._fill(one)
        if self._scorer.takes(outputs):
            await self._scorer.score(outputs[0], columns)
        else:
            await self._compute_score(outputs, kwargs=columns)
        for one, known in zip(outputs, cut, strict=True):
            one.extra_fields[CUT_OFF] = known
        return _Session(outputs, columns)

    def _fill(self, output: Any) -> None:
        """An empty response becomes a row of one end token that the policy did not generate, to bear the reward."""
        if not output.response_ids:
            end, unknown = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id or 0
            output.response_ids, output.response_mask = [unknown if end is None else end], [0]
            output.response_logprobs = [0.0] if self.rollout_config.calculate_log_probs else None

    async def _rows(self, sessions: list[_Session], validate: bool) -> list[Row]:
        """The group's rows, with the teacher's log-probs where verl distils."""
        for session in sessions:
            last = session.outputs[-1]
            await self._compute_teacher_logprobs(
                last,
                prompt_ids=last.prompt_ids,
                response_ids=last.response_ids,
                validate=validate,
                sample_kwargs=session.columns,
            )
        return [row for session in sessions for row in session_rows(self, session.outputs, session.columns)]


class _Group:
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
        self._limit = int(self._params.get("max_tokens") or worker.config.data.max_response_length)
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
    ) -> list[Rollout]:
        """Roll out and score `n` more sessions (the group's size) without publishing them; failed ones are missing."""
        changes = {"temperature": temperature, "max_tokens": max_tokens}
        params = {key: value for key, value in changes.items() if value is not None}
        row = {} if messages is None else {"raw_prompt": messages}
        sessions = await self.sessions(n or self.size, params, row)
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
        limit, room = max_tokens or self._limit, rollout.prompt_length + rollout.response_length
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
    ) -> list[_Session]:
        """`n` scored sessions; the exceptions of failed ones are logged."""
        first, self._started = self._started, self._started + n
        wanted = {**self._params, **(params or {})}
        results = await asyncio.gather(*[self._one(number, wanted, row or {}) for number in range(first, first + n)])
        for error in (result for result in results if isinstance(result, BaseException)):
            agent_loop_tq.logger.error(f"a session of prompt {self._row['uid']} failed", exc_info=error)
            self.failed += 1
            self._worker.failures.note(error, _name(self._row, self.validate))
        sessions = [result for result in results if isinstance(result, _Session)]
        self.account.add([sum(sum(output.response_mask) for output in session.outputs) for session in sessions])
        return sessions

    async def _one(self, number: int, wanted: Mapping[str, Any], row: Mapping[str, Any]) -> _Session | BaseException:
        """What it raises is its result: left to the task, `sys.exit` would end the event loop."""
        listen()
        try:
            return await self._run(number, dict(wanted), row)
        except BaseException as error:
            return error

    def _run(self, number: int, params: dict[str, Any], row: Mapping[str, Any]) -> Any:
        if self._worker._seeded:
            params[self._worker.seed_name] = self._seed(number)
        asked = {ROLLOUT_N: self.size, MAX_TOKENS: int(params.get("max_tokens") or self._limit)}
        columns = {**self._row, **asked, **row}
        return self._worker._run_agent_loop(
            params, trajectory=self._trajectory, trace=self._trace, session_id=number, **columns
        )

    def _seed(self, number: int, *apart: int) -> int:
        """The same for the same draw in another run of the same seed, whatever order requests arrive in."""
        seed = self._worker.rollout_config.seed
        key = [seed, self.step, _number(self._row["index"]) if self.validate else self.prompt.id, int(self.validate)]
        return int(np.random.SeedSequence([*key, number, *apart]).generate_state(1, np.uint32)[0])

    def _rollout(self, session: _Session) -> Rollout:
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
        )


def _name(row: Mapping[str, Any], validate: bool) -> str:
    """A prompt in a message."""
    return f"validation prompt {row.get('index')}" if validate else f"prompt {prompt_id_of(row['uid'])}"


def _number(index: Any) -> int:
    """A part of a seed for a validation prompt, whose `extra_info.index` can be a number or any name."""
    if isinstance(index, (int, np.integer)) and index >= 0:
        return int(index)
    return int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=4).digest(), "big")


class GroupRun:
    """The run as `rollout_group` sees it in an agent-loop worker: settings, step, randomness, metrics, the policy."""

    def __init__(self, config: Any, group: _Group) -> None:
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


class PluginAgentLoopManager(AgentLoopManagerTQ):
    """Starts the workers above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(PluginAgentLoopWorker)
