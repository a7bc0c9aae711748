"""verl's agent-loop workers with plugins in them: how one group of responses is generated, scored and published.

A group's sessions are rolled out and scored first and then written to the queue in one piece, so that nothing of a
group that is rolled again ever reaches the trainer.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import ray
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap, _agent_loop_registry
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_plugins.bridge import census
from verl_plugins.bridge.defaults import WorkerDefaults
from verl_plugins.bridge.failures import Executor, Failures, give_up
from verl_plugins.bridge.group import PREFIX, Group, GroupRun, Session, called
from verl_plugins.bridge.late import Begun
from verl_plugins.bridge.loops import CUT_OFF, SINGLE_TURN, Ends, Listening, SingleTurn, heard, refuse_long_prompts
from verl_plugins.bridge.rows import MAX_TOKENS, PREFILL, ROLLOUT_N, Publisher, RewardBatcher, Row, session_rows
from verl_plugins.bridge.segments import in_rows
from verl_plugins.bridge.serving import seed_name
from verl_plugins.composition.blame import told
from verl_plugins.diagnostics.budget import ACCOUNT_FIELD
from verl_plugins.errors import DataError, ResultError

AGENT = "__agent_name__"
"""Column of a session on its way through the loop that it names; verl takes the dataset's away."""
OWN_SINGLE_TURN = f"{SingleTurn.__module__}.{SingleTurn.__qualname__}"
METRICS_FIELD = "plugin_metrics"
"""Metrics logged during `rollout_group` travel to the driver in this part of a row's extra fields."""


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
            group = Group(self, prompt, sampling_params, trajectory, trace)
            self.failures.asked += group.size
            with self._begun.at(uid, called(prompt, validate)):
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
                give_up(f"the status of {called(prompt, validate)} cannot be stored: {told(last)}")

    def _failed(self, error: BaseException, prompt: dict, validate: bool, group: Group | None) -> None:
        """A whole group is lost: its sessions count, but for those that failed before."""
        agent_loop_tq.logger.error(f"rollout of prompt {prompt['uid']} failed", exc_info=error)
        lost = 1 if group is None else max(1, group.size - group.failed)
        self.failures.asked += group is None
        self.failures.note(error, called(prompt, validate), lost)

    async def take_failures(self) -> Failures:
        """What failed since the driver last asked."""
        return self.failures.take()

    async def late(self, seconds: float) -> tuple[int, str, float, str] | None:
        """Prompts that have taken longer than this, as `Begun.late` says."""
        return self._begun.late(seconds)

    async def _generate_group(self, group: Group) -> list[Session]:
        if group.validate or not self._has_group_control:
            return await group.sessions(group.size)
        run = GroupRun(self.config, group)
        rollouts = await self.plugins.hook.rollout_group(run=run, prompt=group.prompt, sample=group.sample)
        if rollouts is None:
            return await group.sessions(group.size)
        if not rollouts and not group.failed:
            raise ResultError("rollout_group returned no rollout; None leaves the group to verl")
        group.size = len(rollouts)
        sessions = [in_rows(rollout, group.limit) for rollout in rollouts]
        for number, session in enumerate(sessions):
            session.columns |= {"session_id": number, ROLLOUT_N: group.size}
            for output in session.outputs:
                self._fill(output)
        if run.metrics and sessions:
            sessions[0].outputs[-1].extra_fields[METRICS_FIELD] = run.metrics
        return sessions

    async def _run_agent_loop(self, sampling_params: dict, trajectory: dict, *, agent_name: str, **columns: Any) -> Any:
        """verl's own, except that its single-turn loop is set up once and copied instead of made from its settings."""
        columns[AGENT] = agent_name
        if agent_name != SINGLE_TURN or _agent_loop_registry[SINGLE_TURN]["_target_"] != OWN_SINGLE_TURN:
            if columns.get(PREFILL) or columns.get(PREFIX):
                who = f"prompt {columns['uid']} with the agent loop {agent_name!r}"
                raise DataError(
                    f"{who}: only {SINGLE_TURN!r} can begin answers (Prompt.prefill) or continue them (prefix)"
                )
            return await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, **columns)
        columns.pop("trace", None)
        loop = self.single_turn()
        loop.prefill, loop.prefix = columns.get(PREFILL, ""), columns.pop(PREFIX, [])
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

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **columns: Any) -> Session:
        """Score a session's outputs and hand them back instead of publishing them."""
        if AGENT in columns:
            columns["agent_name"] = columns.pop(AGENT)
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
        return Session(outputs, columns)

    def _fill(self, output: Any) -> None:
        """An empty response becomes a row of one end token that the policy did not generate, to bear the reward."""
        if not output.response_ids:
            end, unknown = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id or 0
            output.response_ids, output.response_mask = [unknown if end is None else end], [0]
            output.response_logprobs = [0.0] if self.rollout_config.calculate_log_probs else None

    async def _rows(self, sessions: list[Session], validate: bool) -> list[Row]:
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


class PluginAgentLoopManager(AgentLoopManagerTQ):
    """Starts the workers above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(PluginAgentLoopWorker)
