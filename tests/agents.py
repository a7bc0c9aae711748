"""An agent-loop worker as it runs in training, in this process: without Ray, queue and rollout server."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
from verl.experimental.agent_loop import agent_loop
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.replica import TokenOutput

from verl_plugins import Plugin
from verl_plugins.bridge import census, failures, rows
from verl_plugins.bridge import rollout as bridge_rollout
from verl_plugins.bridge.rollout import PluginAgentLoopWorker
from verl_plugins.composition import outcome
from verl_plugins.composition.compose import compose
from verl_plugins.composition.manager import Plugins
from verl_plugins.cpu.model import make_tokenizer

TOKENIZER = make_tokenizer()
EOS, OTHER_EOS = TOKENIZER.eos_token_id, 5
GROUP = 2
SEEN = 10
"""Seconds after which a prompt that nobody has told anything of counts as hanging."""


class Ended(BaseException):
    """What stands for the end of the worker's process."""


@dataclass
class Servers:
    """A client of rollout servers: every answer is what `give` makes of the prompt and the number of the request."""

    give: Callable[[Sequence[int], int], Any]
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def generate(self, request_id: str, *, prompt_ids: Sequence[int], sampling_params: Any, **_: Any) -> Any:
        self.asked.append({"prompt_ids": list(prompt_ids), **sampling_params})
        given = self.give(prompt_ids, len(self.asked) - 1)
        await asyncio.sleep(0)
        if isinstance(given, BaseException):
            raise given
        return given


def answer(ids: Iterable[int], stop_reason: str | None = "completed") -> TokenOutput:
    """What a server gives."""
    ids = list(ids)
    return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason=stop_reason, extra_fields={})


async def right(data: Any) -> list[dict[str, Any]]:
    """A reward worker for which every answer is right."""
    return [{"reward_score": 1.0, "reward_extra_info": {"acc": 1.0}}] * len(data)


class Queue:
    """What was stored: rows by key, and the status of prompts."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.status: dict[str, str] = {}
        self.refuse: Callable[[Sequence[str]], BaseException | None] = lambda keys: None

    async def put(self, keys: Sequence[str], partition_id: str, tags: Sequence[Mapping], fields: Any = None) -> None:
        if error := self.refuse(keys):
            raise error
        for place, (key, tag) in enumerate(zip(keys, tags, strict=True)):
            if fields is None:
                self.status[key] = tag["status"]
            else:
                self.rows[key] = {name: fields[place][name] for name in fields.keys()}  # noqa: SIM118


@functools.cache
def _config(*overrides: str) -> Any:
    """Composed once: with what verl makes of it, that is nearly all that a worker takes."""
    return compose("grpo", "cpu", overrides).config


_typed: dict[int, Any] = {}


def _typed_once(section: Any) -> Any:
    if id(section) not in _typed:
        _typed[id(section)] = omega_conf_to_dataclass(section)
    return copy.copy(_typed[id(section)])


class Agents:
    """Makes workers, and lets them generate."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model, self._patch, self.queue = model, monkeypatch, Queue()
        monkeypatch.setattr(agent_loop, "omega_conf_to_dataclass", _typed_once)
        monkeypatch.setattr(bridge_rollout.agent_loop_tq.tq, "init", lambda: None)
        monkeypatch.setattr(rows.tq, "async_kv_batch_put", self.queue.put)
        self.said: list[str] = []
        monkeypatch.setattr(bridge_rollout, "give_up", self._ended)

    def _ended(self, sentence: str) -> None:
        self.said.append(sentence)
        raise Ended(sentence)

    def worker(
        self, servers: Servers, *overrides: str, plugins: Sequence[Plugin] = (), score: Callable = right
    ) -> PluginAgentLoopWorker:
        """A worker with its whole configuration."""
        path = f"actor_rollout_ref.model.path={self._model}"
        config = _config(path, f"actor_rollout_ref.rollout.n={GROUP}", *overrides)
        made = Plugins(plugins, check=outcome.check)
        self._patch.setattr(census, "build", lambda section, role: made)

        async def last(data: Any) -> dict[str, Any]:
            return (await score(data))[-1]

        reward = SimpleNamespace(
            compute_score_batch=SimpleNamespace(remote=score), compute_score=SimpleNamespace(remote=last)
        )
        return PluginAgentLoopWorker(config, servers, None, [reward])

    def register(self, name: str, loop: type) -> None:
        """An agent loop of somebody else's."""
        self._patch.setattr(loop, "__module__", "somebody_s", raising=False)
        self._patch.setitem(sys.modules, "somebody_s", SimpleNamespace(Loop=loop, __spec__=None))
        self._patch.setitem(bridge_rollout._agent_loop_registry, name, {"_target_": "somebody_s.Loop"})

    def generate(
        self, worker: PluginAgentLoopWorker, *prompts: dict[str, Any], validate: bool = False
    ) -> failures.Failures:
        """Draw prompts, wait for the status of each, and give what failed."""
        params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
        trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": validate}

        # Both belong to the event loop, which in training is one.
        worker._single_turn, worker._threads = None, failures.Executor()

        async def run() -> None:
            calls = [worker._run_prompt(prompt, dict(params), trajectory) for prompt in prompts]
            done = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), SEEN)
            for error in (one for one in done if isinstance(one, BaseException)):
                raise error

        asyncio.run(run())
        return worker.failures.take()


def prompt(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A row of the dataset, drawn in step 1."""
    return {
        "uid": f"{number}-1-0",
        "global_steps": 1,
        "index": number,
        "agent_name": "single_turn_agent",
        "raw_prompt": [{"role": "user", "content": "1+1="}],
        "data_source": "sums",
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": number},
        **columns,
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two end tokens."""
    folder = models.write(tmp_path_factory.mktemp("tiny") / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, OTHER_EOS]}))
    return folder


@pytest.fixture
def agents(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Agents:
    """See `Agents`."""
    return Agents(tiny, monkeypatch)
