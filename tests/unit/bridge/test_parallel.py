"""What needs several GPUs, or other data, to be seen in a training: pipelines, forward passes, a critic, the order."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl.workers.config import ActorConfig
from verl.workers.engine.base import BaseEngine
from verl.workers.engine.utils import prepare_micro_batches

from verl_plugins import Batch, Plugin, hookimpl
from verl_plugins.bridge.actor import EngineActor
from verl_plugins.bridge.defaults import ActorDefaults
from verl_plugins.bridge.joined import JoinedMetrics
from verl_plugins.bridge.loss import STEP_KEY, PluginLoss
from verl_plugins.bridge.run import DriverRun
from verl_plugins.bridge.trainer import PluginTrainerSync
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import DataError, ResultError


class Counting(Plugin):
    """Steps, and says so, on every stage of a pipeline; logs what the loss chose, where there is a loss."""

    name = "counting"

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor):
        actor.log({"steps": 1.0})
        norm = yield
        return norm / 2


class PipelineStage(BaseEngine):
    """One stage of a pipeline, as verl's engines have it: only the last returns anything."""

    def __init__(self, last: bool) -> None:
        self.last = last
        self.stepped = 0

    def optimizer_zero_grad(self) -> None:
        pass

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> dict:
        return {"metrics": {"loss": [0.5]}, "model_output": {}} if self.last else {}

    def optimizer_step(self) -> float:
        self.stepped += 1
        return 3.0

    def is_mp_src_rank_with_outputs(self) -> bool:
        return self.last

    def get_data_parallel_group(self) -> None:
        return None


def updated(last: bool) -> tuple[PipelineStage, PluginLoss, TensorDict | None]:
    """One mini-batch through a stage, as verl's worker drives it."""
    engine, metrics = PipelineStage(last), JoinedMetrics()
    plugins = Plugins([Counting(Counting.Config())])
    plugins.add_fallback(ActorDefaults(engine.optimizer_step))
    config = ActorConfig(strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    loss = PluginLoss(plugins, config, 0, metrics)
    actor, train_batch = EngineActor(engine, loss, metrics).scoped("counting"), engine.train_batch
    engine.optimizer_step = actor.optimizer_step

    def train_mini_batch(data: TensorDict) -> TensorDict | None:
        output = actor.train_batch(train_batch, data, loss_function=loss)
        return tu.get_tensordict({}, {"metrics": output["metrics"]}) if last else None

    data = tu.get_tensordict({"responses": torch.zeros(1, 1)}, {STEP_KEY: 4})
    return engine, loss, actor.train_mini_batch(train_mini_batch, data)


class TestPipeline:
    def test_a_stage_without_outputs_updates_and_reports_nothing(self) -> None:
        engine, loss, output = updated(last=False)
        assert output is None
        assert (engine.stepped, loss.step, loss.mini_batch) == (1, 4, 1)

    def test_the_last_one_reports_what_verl_and_the_plugin_have(self) -> None:
        engine, _, output = updated(last=True)
        assert engine.stepped == 1
        metrics = reduce_metrics(dict(tu.get(output, "metrics")))
        assert metrics == {"loss": 0.5, "grad_norm": 1.5, "plugins/counting/steps": 1.0}


class ActorWorkers:
    """Splits rows over ranks and micro-batches with verl's own functions; a token's log-prob is minus its id."""

    def __init__(self, ranks: int, micro_batch: int | None) -> None:
        self.ranks, self.micro_batch = ranks, micro_batch
        self.sizes: list[int] = []

    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        assert len(data) % self.ranks == 0
        for part in tu.chunk_tensordict(data, self.ranks):
            if self.micro_batch:
                tu.assign_non_tensor(part, use_dynamic_bsz=False, micro_batch_size_per_gpu=self.micro_batch)
                self.sizes += map(len, prepare_micro_batches(part)[0])
        following = [-torch.roll(row, -1).float() for row in data["input_ids"].unbind()]
        return TensorDict({"log_probs": torch.nested.as_nested_tensor(following, layout=torch.jagged)}, len(data))


def run_with(ranks: int = 1, micro_batch: int | None = None, processor: object = None) -> DriverRun:
    rollout = {"log_prob_use_dynamic_bsz": micro_batch is None, "log_prob_micro_batch_size_per_gpu": micro_batch}
    return DriverRun(
        SimpleNamespace(
            config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"temperature": 1.0, **rollout}}}),
            processor=processor,
            data_parallel_size=ranks,
            actor_rollout_wg=ActorWorkers(ranks, micro_batch),
            tokenizer=None,
        )
    )


class TestForwardPasses:
    """`run.score` and `run.log_probs` for any number of rows."""

    PROMPTS = [[1, 2, 3], [4], [5, 6], [7], [8]]
    ANSWERS = [[11, 12], [13], [14, 15, 16], [17], [18, 19]]

    @pytest.mark.parametrize(("ranks", "micro_batch"), [(1, None), (2, None), (3, None), (1, 8), (2, 8), (4, 3)])
    @pytest.mark.parametrize("rows", [1, 3, 5])
    def test_any_number_of_rows_over_ranks_and_micro_batches_of_a_fixed_size(self, ranks, micro_batch, rows) -> None:
        run = run_with(ranks, micro_batch)
        found = run.score(self.PROMPTS[:rows], self.ANSWERS[:rows])
        assert [row.tolist() for row in found] == [[-token for token in row] for row in self.ANSWERS[:rows]]
        assert set(run._trainer.actor_rollout_wg.sizes) <= {micro_batch}

    def test_of_a_batch(self) -> None:
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
        batch = Batch.from_tensors(
            uid=["0-1-0", "0-1-0", "1-1-0"],
            response_mask=mask,
            rm_scores=torch.zeros(3, 3),
            responses=torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]]),
            response_lengths=mask.sum(1),
            prompts=torch.tensor([[1, 2], [3, 0], [3, 0]]),
            prompt_lengths=torch.tensor([2, 1, 1]),
        )
        expected = [[-5.0, -6.0, 0.0], [-7.0, -8.0, -9.0], [-4.0, 0.0, 0.0]]
        assert run_with(2, 2).log_probs(batch).tolist() == expected

    def test_a_model_with_a_processor_is_refused_instead_of_scored_without_its_images(self, sentence) -> None:
        run = run_with(processor=object())
        with pytest.raises(DataError) as error:
            run.score(self.PROMPTS, self.ANSWERS)
        sentence(error.value, "run.log_probs", "images")


class Dropping(Plugin):
    """Leaves the first sessions of every group out."""

    name = "dropping"
    sessions = 0

    @hookimpl
    def select_rows(self, run, batch):
        batch.drop(batch.session < self.sessions)


class Trainer(PluginTrainerSync):
    """As far as balancing and the critic's update ask it; the queue is left out."""

    def __init__(self, plugins: list[Plugin], n: int, ranks: int, critic: bool = True) -> None:
        self.config = OmegaConf.create(
            {
                "critic": {"ppo_mini_batch_size": 4, "ppo_epochs": 1, "data_loader_seed": 1, "shuffle": False},
                "actor_rollout_ref": {
                    "rollout": {"n": n, "temperature": 1.0},
                    "actor": {"ppo_mini_batch_size": 4},
                },
                "data": {"max_response_length": 3},
                "trainer": {"critic_warmup": 0},
            }
        )
        self.plugins, self.timing_raw, self.global_steps, self.use_critic = Plugins(plugins), {}, 1, critic
        self.needs = frozenset()
        self.run, self.tokenizer = SimpleNamespace(scoped=lambda owner: None), SimpleNamespace(eos_token_id=0)
        self.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(ranks))})
        self.critic_wg = SimpleNamespace(train_mini_batch=self.train_critic)

    def _open(self, keys: list[str], *rest: Any) -> Batch:
        mask = torch.ones(len(keys), 3)
        uid, session, _ = zip(*[key.rsplit("_", 2) for key in keys], strict=True)
        sessions = [int(number) for number in session]
        return Batch.from_tensors(uid=uid, session=sessions, response_mask=mask, rm_scores=mask)

    def train_critic(self, batch: KVBatchMeta) -> Any:
        """What verl's worker does with it: its mini-batches have to go into the rows of a rank."""
        size, ranks = batch.extra_info["mini_batch_size"], len(self.actor_rollout_wg._dispatch_info["actor"])
        assert size % ranks == 0 and len(batch) % size == 0
        self.mini_batches = len(batch) // size
        return SimpleNamespace(get=lambda: {"metrics": {"mfu": 0.0, "loss": 1.0}})


def arrived(prompts: int, n: int, order: Callable[[list[str]], list[str]] = sorted) -> KVBatchMeta:
    keys = order([f"{prompt}-1-0_{session}_0" for prompt in range(prompts) for session in range(n)])
    tags = [{"seq_len": 3 + int(key.split("_")[1]) ** 2} for key in keys]
    return KVBatchMeta(keys=keys, tags=tags, partition_id="train", extra_info={})


class TestCritic:
    @pytest.mark.parametrize(("n", "dropped"), [(8, 0), (9, 1), (8, 4), (6, 2)])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_is_updated_on_the_rows_there_are(self, n, dropped, ranks) -> None:
        plugin = Dropping(Dropping.Config())
        plugin.sessions = dropped
        trainer, metrics = Trainer([plugin], n, ranks), {}
        batch = trainer._update_critic(trainer._balance_batch(arrived(8, n), metrics), metrics)
        assert len(batch) == 8 * (n - dropped)
        assert trainer.mini_batches == 2
        assert metrics["critic/loss"] == 1.0
        assert trainer.config.actor_rollout_ref.rollout.n == n


class TestOrder:
    """Stages see rows by their keys: not as they came from the rollout, nor as verl spread them over ranks."""

    def estimated(self, trainer: Trainer, batch: KVBatchMeta) -> tuple[list[str], dict[str, float]]:
        """The keys as `estimate_advantage` sees them, and the advantage each row then has."""
        seen: list[str] = []

        class Numbering(Plugin):
            name = "numbering"

            @hookimpl
            def estimate_advantage(self, run, batch):
                seen.extend(batch.keys)
                return torch.arange(len(batch))[:, None].float().expand(-1, 3)

        trainer.plugins = Plugins([Numbering(Numbering.Config())])
        mask = torch.ones(len(batch), 3)
        fields = {"response_mask": mask, "token_level_rewards": mask.clone()}
        trainer.defaults, trainer._prompt_log_probs, trainer._statistics = SimpleNamespace(), {}, {}
        data = SimpleNamespace(batch=fields)
        trainer._estimate_by_stage(lambda *args, **kwargs: None, data, batch.keys, {})
        return seen, dict(zip(batch.keys, data.batch["advantages"][:, 0].tolist(), strict=True))

    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("order", [sorted, lambda keys: keys[::-1], lambda keys: keys[1::2] + keys[::2]])
    def test_on_any_number_of_ranks_whatever_came_first(self, ranks, order) -> None:
        trainer = Trainer([], 12, ranks, critic=False)
        batch = trainer._balance_batch(arrived(4, 12, order), {})
        seen, advantages = self.estimated(trainer, batch)
        by_key = [f"{prompt}-1-0_{session}_0" for prompt in range(4) for session in range(12)]
        assert seen == by_key  # session 10 behind 9
        assert advantages == {key: number for number, key in enumerate(by_key)}
        assert (batch.keys != by_key) == (ranks > 1)

    def test_rows_that_verl_made_up_are_not_among_them(self, monkeypatch) -> None:
        trainer = Trainer([], 3, 1, critic=False)
        monkeypatch.setattr(trainer_base, "upsample_batch_to_divisible_size", lambda batch, *rest: batch)
        batch = trainer._balance_batch(arrived(2, 3), {})
        padded = KVBatchMeta(keys=["pad_0_0", *batch.keys], tags=[{}, *batch.tags], partition_id="train")
        seen, advantages = self.estimated(trainer, padded)
        assert seen == sorted(batch.keys)
        assert advantages["pad_0_0"] == 0


class Detached(Plugin):
    """Computes its loss from numbers, and not from the policy."""

    name = "detached"

    @hookimpl
    def policy_loss(self, tokens):
        return tokens.log_probs.detach() * tokens.advantages


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_without_gradient_is_said_where_it_would_be_learnt_from(monkeypatch, sentence, training) -> None:
    """torch's own words for it do not say whose loss it was; where verl only measures, nothing needs a gradient."""
    plugins = Plugins([Detached(Detached.Config())])
    config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    loss = PluginLoss(plugins, config, 0, JoinedMetrics())
    monkeypatch.setattr("verl_plugins.bridge.loss.ppo_loss", lambda **_: (torch.zeros(()), {}))
    loss.enter_step(3)
    with torch.set_grad_enabled(training):
        if not training:
            loss({}, tu.get_tensordict({"responses": torch.zeros(1, 1)}))
            return
        with pytest.raises(ResultError) as refused:
            loss({}, tu.get_tensordict({"responses": torch.zeros(1, 1)}))
    sentence(refused.value, "step 3: the loss has no gradient", "plugin 'detached' in policy_loss", "without detach")
