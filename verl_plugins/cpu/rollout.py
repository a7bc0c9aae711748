"""A rollout server on plain Transformers, for machines without vLLM or SGLang; it runs on the platform's device.

Concurrent requests are gathered into waves and decoded together, each with random numbers of its own seed, in an order
given by seed and prompt. The size of a wave depends on timing and changes the last bits of its log-probs; with
`rollout.full_determinism` each request is decoded by itself, and a run of the same seed gives the same numbers.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_plugins.bridge import census
from verl_plugins.bridge.logits import shape
from verl_plugins.cpu.generation import Completion, Request, end_tokens, generate
from verl_plugins.cpu.reading import Reading, Told, read
from verl_plugins.errors import DataError

QUIET_SECONDS = 0.005
"""A wave starts when no request has arrived for this long."""
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
"""A matrix of one expert, as verl sends it; the model keeps those of all experts of a layer in one tensor."""


def _server_name(replica_rank: int) -> str:
    return f"transformers_server_{replica_rank}"


class ServerAdapter(BaseRollout):
    """The training side: carries new weights from an actor worker to its server."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        self._is_leader = rank % self.config.tensor_model_parallel_size == 0
        self._replica_rank = rank if replica_rank == -1 else replica_rank

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """The server keeps its weights; its KV cache lives for one wave only."""

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_):
        """Send all weights in buckets of the configured size, then the step they belong to."""
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        server = ray.get_actor(_server_name(self._replica_rank)) if self._is_leader else None
        async for bucket in _buckets(weights, limit):
            if server is not None:
                await server.load_weights.remote(bucket)
        if server is not None:
            await server.set_global_steps.remote(global_steps)


async def _buckets(weights: Any, limit: int) -> AsyncIterator[dict[str, torch.Tensor]]:
    """`weights`: pairs of name and tensor, from the actor beside the server or as a checkpoint engine receives them."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    async for name, tensor in ensure_async_iterator(weights):
        bucket[name] = tensor.detach().to("cpu", copy=True)
        size += bucket[name].nbytes
        if size >= limit:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket


class TransformersServer:
    """The serving side: one model, one wave at a time."""

    def __init__(self, config: DictConfig, model_config: DictConfig, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        settings: HFModelConfig = omega_conf_to_dataclass(model_config)
        self.tokenizer = settings.tokenizer
        self.ends = end_tokens(settings.tokenizer, settings.generation_config, settings.hf_config)
        self.model = _build_model(self.config, settings).to(get_device_name()).eval()
        self._weights = self.model.state_dict()
        self._queue: asyncio.Queue[tuple[Request | Reading, asyncio.Future]] = asyncio.Queue()
        self._running = asyncio.Event()
        self._running.set()
        self._model_lock = asyncio.Lock()
        self._reject = False
        self._global_steps: int | None = None
        self._loop_task: asyncio.Task | None = None

    async def ready(self) -> bool:
        """Start serving."""
        self._loop_task = asyncio.create_task(self._serve())
        return True

    async def set_plugins(self, section: dict[str, dict[str, Any]]) -> None:
        """Build this process's plugins and have them shape the model's logits; once, before the first request."""
        shape(census.build(section, "rollout server"), self.model)

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any):
        """Continue one prompt; an interrupted request comes back with what it has and stop_reason `aborted`."""
        if self._reject and not self._running.is_set():
            return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted", extra_fields=self._version())
        await self._running.wait()
        room = (self.config.max_model_len or self.config.prompt_length + self.config.response_length) - len(prompt_ids)
        # As in verl's other servers, a request that names its limit may go beyond the length of responses.
        named = sampling_params.keys() & {"max_tokens", "max_new_tokens"}
        budget = room if named else min(self.config.response_length, room)
        if sampling_params.get("prompt_logprobs") is not None and room >= 0:
            told: Told = await self._answer(Reading(prompt_ids, int(sampling_params["prompt_logprobs"])))
            return TokenOutput(
                token_ids=[], log_probs=[], stop_reason="completed", extra_fields={**self._version(), **told.fields()}
            )
        if budget < 1:
            raise DataError(
                f"prompt of {len(prompt_ids)} tokens leaves no room for a response; raise rollout.max_model_len "
                f"({self.config.max_model_len}) or filter the data"
            )
        completion: Completion = await self._answer(Request.from_sampling_params(prompt_ids, sampling_params, budget))
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs,
            stop_reason=completion.stop_reason,
            extra_fields=self._version(),
        )

    async def _answer(self, request: Request | Reading) -> Any:
        """What the wave that it is in makes of it."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))
        await asyncio.wait({future, self._loop_task}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise RuntimeError("the rollout server has stopped serving") from self._loop_task.exception()
        return future.result()

    def _version(self) -> dict[str, int | None]:
        return {"global_steps": self._global_steps}

    async def generate_many(self, requests: list[dict[str, Any]]) -> list[TokenOutput | Exception]:
        """`generate` for requests that arrived together; one that fails does not fail the others."""
        return await asyncio.gather(*[self.generate(**request) for request in requests], return_exceptions=True)

    async def _serve(self) -> None:
        while True:
            wave = await self._gather()
            wave.sort(key=lambda item: (item[0].seed or 0, item[0].prompt_ids))
            try:
                async with self._model_lock:
                    requests = [request for request, _ in wave]
                    answers = await asyncio.to_thread(self._computed, requests)
                for (_, future), answer in zip(wave, answers, strict=True):
                    if not future.done():  # whoever asked has given up
                        future.set_result(answer)
            except Exception as error:
                for _, future in wave:
                    if not future.done():
                        future.set_exception(error)

    def _computed(self, requests: list[Request | Reading]) -> list[Completion | Told]:
        """One answer each: what is to be read goes through the model once, the rest is generated."""
        reading = [request for request in requests if isinstance(request, Reading)]
        asking = [request for request in requests if not isinstance(request, Reading)]
        told = iter(read(self.model, reading) if reading else [])
        stop = lambda: not self._running.is_set()  # noqa: E731
        made = iter(generate(self.model, self.tokenizer, asking, stop, self.ends) if asking else [])
        return [next(told if isinstance(request, Reading) else made) for request in requests]

    async def _gather(self) -> list[tuple[Request | Reading, asyncio.Future]]:
        """All requests until none arrives for a moment, at most `rollout.max_num_seqs`; one with full determinism."""
        wave = [await self._queue.get()]
        if self.config.full_determinism:
            return wave
        while len(wave) < self.config.max_num_seqs:
            try:
                wave.append(await asyncio.wait_for(self._queue.get(), QUIET_SECONDS))
            except asyncio.TimeoutError:
                break
        return wave

    async def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy new values into the model's parameters, between waves."""
        async with self._model_lock:
            with torch.no_grad():
                for name, tensor in weights.items():
                    place_of(name, self._weights).copy_(tensor)

    async def set_global_steps(self, global_steps: int | None) -> None:
        self._global_steps = global_steps

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Interrupt the current wave; requests that arrive wait, or fail when asked to, until generation resumes."""
        self._reject = reject_request
        self._running.clear()

    async def resume_generation(self) -> None:
        self._reject = False
        self._running.set()

    async def wake_up(self, tags: list[str] | None = None) -> None: ...
    async def sleep(self) -> None: ...
    async def clear_kv_cache(self) -> None: ...
    async def release_kv_cache(self) -> None: ...
    async def resume_kv_cache(self) -> None: ...
    async def start_profile(self, **_: Any) -> None: ...
    async def stop_profile(self) -> None: ...


def place_of(name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Where the actor's weight of this name belongs in a model's own `weights`.

    Raises:
        DataError: if the model has no such weight.
    """
    if name in weights:
        return weights[name]
    if expert := EXPERT.fullmatch(name):
        packed = weights.get(f"{expert['experts']}.{'down' if expert['part'] == 'down' else 'gate_up'}_proj")
        if packed is not None:
            own = packed[int(expert["number"])]
            return own if expert["part"] == "down" else own.chunk(2)[expert["part"] == "up"]
    raise DataError(f"weight {name!r} of the actor does not exist in the rollout model")


def _build_model(config: RolloutConfig, settings: HFModelConfig) -> torch.nn.Module:
    """The model in the rollout's dtype, of the actor's own configuration (`model.override_config` in it).

    With load_format `dummy` its weights wait for the first weight sync.
    """
    dtype = PrecisionType.to_dtype(config.dtype)
    options = {"trust_remote_code": settings.trust_remote_code}
    if config.load_format != "dummy":
        return AutoModelForCausalLM.from_pretrained(
            settings.local_path, config=settings.hf_config, dtype=dtype, **options
        )
    return AutoModelForCausalLM.from_config(settings.hf_config, dtype=dtype, **options)


class TransformersReplica(RolloutReplica):
    """One server per replica; a replica is one rank, since the server does not shard the model."""

    async def init_colocated(self, resource_pool: Any) -> None:
        """A server on devices of its own, a teacher's; on a CPU there is no device that a worker has to hold for it."""
        if get_device_name() != "cpu":
            return await super().init_colocated(resource_pool)
        self.rollout_mode, self.resource_pool = RolloutMode.COLOCATED, resource_pool
        return await self.launch_servers()

    @property
    def _model(self) -> DictConfig:
        """verl names a teacher's path and nothing else, which would have it ask for flash attention."""
        if not self.is_teacher_model:
            return self.model_config
        return OmegaConf.merge({"override_config": {"attn_implementation": "sdpa"}}, self.model_config)

    @property
    def _name(self) -> str:
        name = _server_name(self.replica_rank)
        return f"teacher_{name}{self.name_suffix}" if self.is_teacher_model else name

    async def launch_servers(self) -> None:
        if self.world_size != 1:
            raise DataError(
                f"rollout.name transformers serves one device per replica, not {self.world_size}: set "
                "tensor_model_parallel_size, data_parallel_size and pipeline_model_parallel_size to 1"
            )
        on_cpu = get_device_name() == "cpu"
        options = {"name": self._name, "max_concurrency": self.max_concurrency, "num_cpus": 0}
        if not on_cpu:
            options |= await self._beside_worker()
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)) if on_cpu else None
        server = ray.remote(TransformersServer).options(**options).remote(self.config, self._model, threads)
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = self._name

    async def _beside_worker(self) -> dict[str, Any]:
        """Actor options that put the server on its worker's node and show it that worker's device."""
        node, device = await self.workers[0].__ray_call__.remote(_whereabouts)
        platform = get_platform()
        env = {
            **dict.fromkeys(platform.ray_noset_envvars(), "1"),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            platform.visible_devices_envvar(): str(device),
        }
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return {"scheduling_strategy": affinity, "runtime_env": {"env_vars": env}}


def _whereabouts(_: Any) -> tuple[str, str]:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids()[get_platform().ray_resource_name()][0]
