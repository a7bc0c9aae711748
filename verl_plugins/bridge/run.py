"""The run as driver stages see it: settings, metrics, randomness, and the policy's log-probs and answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProtoFuture
from verl.utils import tensordict_utils as tu

from verl_plugins.batch import Batch
from verl_plugins.bridge.queue import prompt_id_of
from verl_plugins.bridge.serving import seed_name
from verl_plugins.diagnostics.budget import Account
from verl_plugins.errors import DataError
from verl_plugins.services import Generated

FINGERPRINT_ROWS = 1024


class RowsOfDataset:
    """verl's training dataset by prompt id."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, prompt_id: int) -> dict[str, Any]:
        return dict(self._dataset[int(prompt_id)])

    def _fingerprint(self) -> str:
        """A digest of the number of rows and of evenly spaced rows: sees another subset, order or column."""
        digest = hashlib.sha256(str(len(self)).encode())
        stored = getattr(self._dataset, "dataframe", self._dataset)
        for row in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_ROWS).astype(int)):
            digest.update(json.dumps(stored[int(row)], sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]


class DriverRun:
    """See `verl_plugins.services.Run`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._owner = ""
        self.account = Account()
        """What `generate` has cost and no step has told yet."""
        self._logged: dict[str, list[float]] = defaultdict(list)
        self._generators: dict[tuple[int, str], np.random.Generator] = {}

    def scoped(self, owner: str) -> DriverRun:
        """The same run in the hands of plugin `owner`."""
        other = object.__new__(DriverRun)
        other.__dict__.update(self.__dict__, _owner=owner)
        return other

    @property
    def config(self) -> Any:
        return self._trainer.config

    @property
    def step(self) -> int:
        return self._trainer.global_steps

    @property
    def update(self) -> int:
        trainer = self._trainer
        return (self.step - 1) * trainer.parameter_sync_step + trainer.local_trigger_step + 1

    @property
    def tokenizer(self) -> Any:
        return self._trainer.tokenizer

    @property
    def dataset(self) -> RowsOfDataset:
        return self._trainer.rows

    def log(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._logged[f"plugins/{self._owner}/{key}"].append(float(value))

    def take_metrics(self) -> dict[str, float]:
        """What plugins logged since the last call, averaged where a key was logged more than once."""
        metrics = {key: float(np.mean(values)) for key, values in self._logged.items()}
        self._logged.clear()
        return metrics

    def rng(self, name: str = "") -> np.random.Generator:
        key = (self.step, f"{self._owner}/{name}")
        if key not in self._generators:
            for old in [old for old in self._generators if old[0] != self.step]:
                del self._generators[old]
            self._generators[key] = np.random.default_rng([self._trainer.seed, self.step, *key[1].encode()])
        return self._generators[key]

    def in_flight(self) -> np.ndarray:
        keys = (tq.kv_list("train") or {}).get("train", {})
        drawn = {prompt_id_of(key) for key, tag in keys.items() if tag.get("is_prompt", False)}
        return np.array(sorted(drawn), dtype=np.int64)

    def stop(self, reason: str) -> None:
        self._trainer.stop(f"{self._owner}: {reason}")

    # The policy

    def log_probs(self, batch: Batch, temperature: float | None = None) -> Tensor:
        prompts = _rows(batch.extra("prompts"), batch.prompt_lengths)
        responses = _rows(batch.responses, batch.lengths)
        values = self._forward(prompts, responses, temperature)
        padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        return torch.nn.functional.pad(padded, (0, batch.response_mask.shape[1] - padded.shape[1]))

    def score(self, prompts: Sequence, targets: Sequence) -> list[Tensor]:
        if len(prompts) != len(targets):
            raise DataError(f"run.score: {len(prompts)} prompts but {len(targets)} targets; give one target per prompt")
        ids = [torch.tensor(self._prompt_ids(prompt)) for prompt in prompts]
        answers = [torch.tensor(self._target_ids(target)) for target in targets]
        return self._forward(ids, answers, None)

    def generate(
        self, prompts: Sequence, n: int = 1, temperature: float | None = None, max_tokens: int | None = None
    ) -> list[list[Generated]]:
        rollout = self.config.actor_rollout_ref.rollout
        params = {
            "temperature": rollout.temperature if temperature is None else temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "max_tokens": max_tokens or rollout.response_length,
            "logprobs": True,
        }
        seeds = self.rng("generate").integers(0, 2**31, size=(len(prompts), n))
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        with self._trainer.awake_replicas():
            groups = asyncio.run(self._ask(ids, params, seeds))
        self.account.add([len(answer.token_ids) for group in groups for answer in group])
        return groups

    async def _ask(self, prompts: list[list[int]], params: dict, seeds: np.ndarray) -> list[list[Generated]]:
        client, name = self._trainer.get_llm_client(), seed_name(self.config.actor_rollout_ref.rollout.name)

        async def one(prompt: list[int], seed: int) -> Generated:
            output = await client.generate(
                request_id=f"{self._owner}-{seed}", prompt_ids=prompt, sampling_params={**params, name: int(seed)}
            )
            text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
            return Generated(list(output.token_ids), list(output.log_probs or []), text)

        groups = [asyncio.gather(*[one(p, s) for s in row]) for p, row in zip(prompts, seeds, strict=True)]
        return [list(group) for group in await asyncio.gather(*groups)]

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True)
            return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)
        return [int(token) for token in prompt]

    def _target_ids(self, target: Any) -> list[int]:
        if isinstance(target, str):
            return self.tokenizer(target, add_special_tokens=False)["input_ids"]
        return [int(token) for token in target]

    def _rows_of_a_pass(self) -> int:
        """verl wants as many rows for each rank, and with micro-batches of a fixed size those filled."""
        rollout = self.config.actor_rollout_ref.rollout
        size = 1 if rollout.log_prob_use_dynamic_bsz else rollout.log_prob_micro_batch_size_per_gpu or 1
        return self._trainer.data_parallel_size * size

    def _forward(self, prompts: list[Tensor], responses: list[Tensor], temperature: float | None) -> list[Tensor]:
        """Log-probs of each response after its prompt, from the actor workers; the queue is not touched."""
        if self._trainer.processor is not None:
            raise DataError(
                "run.log_probs and run.score make forward passes over text only, and the model has a processor for "
                "images or the like: leave out the plugin that asks for them, or train a text model"
            )
        count = len(prompts)
        missing = -count % self._rows_of_a_pass()
        prompts, responses = prompts + prompts[:1] * missing, responses + responses[:1] * missing
        data = _forward_table(prompts, responses)
        scale = self.config.actor_rollout_ref.rollout.temperature if temperature is None else temperature
        tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False, temperature=float(scale))
        output = self._trainer.actor_rollout_wg.compute_log_prob(data)
        if isinstance(output, DataProtoFuture):
            output = output.get()
        whole = output["log_probs"].unbind()
        return [
            row[len(prompt) - 1 : len(prompt) - 1 + len(response)].clone()
            for row, prompt, response in zip(whole[:count], prompts, responses, strict=False)
        ]


def _rows(padded: Tensor, lengths: Tensor) -> list[Tensor]:
    return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]


def _forward_table(prompts: list[Tensor], responses: list[Tensor]) -> TensorDict:
    """The queue's fields that a forward pass of the engine reads, for rows that are not in the queue."""
    whole = [torch.cat([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
    columns = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": whole,
        "position_ids": [torch.arange(len(row)) for row in whole],
        "response_mask": [torch.ones_like(response) for response in responses],
        "loss_mask": [torch.ones_like(response) for response in responses],
    }
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
    return TensorDict(nested, batch_size=len(whole))
