"""The critic's values from its forward pass to the estimator and to its loss: with one head bit for bit verl's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from value_heads_of_ranks import CLIP, ETA, known, layer
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.losses import value_loss

from verl_plugins.advantage.ravl import Ravl, diversity
from verl_plugins.bridge.critic import PluginValueLoss
from verl_plugins.bridge.defaults import CriticDefaults, DriverDefaults
from verl_plugins.bridge.trainer import PluginTrainerSync
from verl_plugins.composition.manager import Plugins
from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.testing import FakeRun

SCRIPT = Path(__file__).with_name("value_heads_of_ranks.py")
KEYS = ["5-1-0_1_0", "3-1-0_0_0", "5-1-0_0_0", "pad0_0_0", "3-1-0_1_0"]
MASKS = [[1, 1, 1, 1], [1, 0, 1, 1, 0], [1], [0], [1, 1]]
"""A hole and an observation at the end in the second row, a single token, a row of verl's padding."""
REAL = [0, 1, 2, 4]
PROMPTS = [2, 1, 3, 1, 2]


class Queue:
    """TransferQueue in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> TensorDict:
        names = [name for name in select_fields or self.rows[keys[0]] if name in self.rows[keys[0]]]
        return list_of_dict_to_tensordict([{name: self.rows[key][name] for name in names} for key in keys])

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict, **_: Any) -> KVBatchMeta:
        for name in fields.keys():  # noqa: SIM118  a TensorDict iterates over its batch
            values = fields[name].unbind() if isinstance(fields[name], torch.Tensor) else fields[name]
            for key, value in zip(keys, values, strict=True):
                self.rows.setdefault(key, {})[name] = value
        tags = [{} for _ in keys]
        return KVBatchMeta(keys=keys, tags=tags, partition_id=partition_id, fields=[*self.rows[keys[0]]], extra_info={})


class Both:
    """As far as values and advantages ask a trainer."""

    def start(self, heads: int, plugins: list[Any]) -> None:
        algorithm = {"adv_estimator": "gae", "gamma": 0.97, "lam": 0.9, "use_kl_in_reward": False}
        rollout = {"n": 2, "temperature": 1.0}
        self.config = OmegaConf.create(
            {"algorithm": algorithm, "actor_rollout_ref": {"rollout": rollout}, "data": {"max_response_length": 9}}
        )
        self.use_critic, self.heads = True, heads
        self.critic_wg = SimpleNamespace(infer_batch=self.infer)
        self.plugins, self.defaults, self.run = Plugins(plugins), DriverDefaults(), FakeRun()
        self.plugins.add_fallback(self.defaults)
        self.needs = frozenset().union(*[plugin.needs for plugin in plugins])
        self.timing_raw, self.tokenizer, self.global_steps, self.parameter_sync_step = {}, None, 1, 1
        self.local_trigger_step, self._begun_with, self._shipped, self._columns = 0, {}, set(), {"responses"}
        self._prompt_log_probs, self._statistics, self._updates = {}, {}, []
        self._full = SimpleNamespace(dropped=torch.zeros(1), additions=[])
        self._beside = SimpleNamespace(submit=lambda *_: None)

    def infer(self, batch: KVBatchMeta) -> Any:
        """The critic's forward pass: values [sequence] with one head, else [sequence, N]."""
        draw = torch.Generator().manual_seed(3)
        whole = [torch.randn(n + len(mask), self.heads, generator=draw) for n, mask in zip(PROMPTS, MASKS, strict=True)]
        rows = [row[:, 0] if self.heads == 1 else row for row in whole]
        self.whole = whole
        fields = TensorDict({"values": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, batch_size=len(rows))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        return SimpleNamespace(futures=[])


class Verls(Both, PPOTrainerSync):
    def __init__(self, heads: int) -> None:
        self.start(heads, [])


class Ours(Both, PluginTrainerSync):
    def __init__(self, heads: int, *plugins: Any) -> None:
        self.start(heads, list(plugins))


def estimated(monkeypatch: pytest.MonkeyPatch, trainer: Any, truncated: list[int]) -> list[dict[str, torch.Tensor]]:
    """The rows of the queue after values and advantages."""
    queue = Queue()
    for name in ("kv_batch_get", "kv_batch_put"):
        monkeypatch.setattr(tq, name, getattr(queue, name))
    monkeypatch.setattr(trainer_base.ray, "get", lambda futures: futures)
    draw = torch.Generator().manual_seed(9)
    for key, mask, cut in zip(KEYS, MASKS, truncated, strict=True):
        rewards = torch.zeros(len(mask))
        rewards[-1] = torch.rand(1, generator=draw)
        row = {"uid": key.rsplit("_", 2)[0], "response_mask": torch.tensor(mask), "rm_scores": rewards}
        queue.rows[key] = {**row, "__truncated__": torch.tensor(bool(cut))}
    batch = KVBatchMeta(keys=list(KEYS), tags=[{} for _ in KEYS], partition_id="train", extra_info={})
    metrics: dict[str, Any] = {}
    batch = trainer._compute_values(batch, metrics)
    trainer._compute_advantage(batch, metrics)
    return [queue.rows[KEYS[row]] for row in REAL]


def one_head(**config: Any) -> Ravl:
    return Ravl(Ravl.Config(members=1, **config))


@pytest.mark.parametrize("config", [{}, {"baseline": "mean", "aggregate": "mean"}])
def test_one_head_and_no_truncated_row_is_verls_gae_bit_for_bit(monkeypatch, config) -> None:
    plain = estimated(monkeypatch, Verls(1), [0] * 5)
    found = estimated(monkeypatch, Ours(1, one_head(**config)), [0] * 5)
    for row, theirs, ours in zip(REAL, plain, found, strict=True):
        generated = torch.tensor(MASKS[row]).bool()
        assert torch.equal(ours["advantages"][generated], theirs["advantages"][generated])
        assert theirs["advantages"][generated].any()
        for name in ("returns", "values"):
            assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(ours["head_values"][:, 0], theirs["values"])


def test_nothing_follows_where_nothing_shall(monkeypatch) -> None:
    plain = estimated(monkeypatch, Verls(1), [1] * 5)
    found = estimated(monkeypatch, Ours(1, one_head(bootstrap="none")), [1] * 5)
    assert all(torch.equal(ours["returns"], theirs["returns"]) for ours, theirs in zip(found, plain, strict=True))


@pytest.mark.parametrize("truncated", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
@pytest.mark.parametrize("heads", [1, 3])
def test_gae_goes_on_behind_truncated_rows(monkeypatch, truncated, heads) -> None:
    """The recursion of the page, in plain Python, of all rows, those at the edge with observations there too."""
    trainer = Ours(heads, Ravl(Ravl.Config(members=heads)))
    found = estimated(monkeypatch, trainer, truncated)
    for place, ours in zip(REAL, found, strict=True):
        least = trainer.whole[place].amin(-1).tolist()
        values, end = least[PROMPTS[place] - 1 : -1], least[-1]
        follows, advantage, expected = end if truncated[place] else 0.0, 0.0, [0.0] * len(values)
        for t in reversed(range(len(values))):
            if MASKS[place][t]:
                delta = float(ours["rm_scores"][t]) + 0.97 * follows - values[t]
                advantage, follows = delta + 0.97 * 0.9 * advantage, values[t]
            expected[t] = advantage + values[t]
        assert ours["returns"].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert ours["values"].tolist() == pytest.approx(values)
    assert trainer.run.metrics["truncated_frac"] == sum(truncated[row] for row in REAL) / len(REAL)


def test_without_a_plugin_values_and_queue_are_verls(monkeypatch) -> None:
    found, plain = estimated(monkeypatch, Ours(1), [1] * 5), estimated(monkeypatch, Verls(1), [1] * 5)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.keys() == theirs.keys() and torch.equal(ours["returns"], theirs["returns"])


CONFIG = SimpleNamespace(cliprange_value=0.1, loss_agg_mode="token-mean", loss_scale_factor=None)


def micro_batch(tokens: int) -> Any:
    """Rows of `MASKS`, of a mini-batch with this many tokens."""
    draw = torch.Generator().manual_seed(4)
    nested = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)  # noqa: E731
    masks = [torch.tensor(mask) for mask in MASKS]
    of_prompts = nested([torch.zeros(size, dtype=torch.int64) for size in PROMPTS])
    values, returns = ([torch.randn(len(mask), generator=draw) for mask in masks] for _ in range(2))
    tensors = {
        "prompts": of_prompts,
        "responses": nested([torch.zeros_like(mask) for mask in masks]),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
        "values": nested(values),
        "head_values": nested([row[:, None] for row in values]),
        "returns": nested(returns),
    }
    return tu.get_tensordict(tensors, {"dp_size": 2, "batch_num_tokens": tokens, "global_batch_size": 10})


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_loss_of_one_head_is_verls_bit_for_bit(mode) -> None:
    sizes = [prompt + len(mask) for prompt, mask in zip(PROMPTS, MASKS, strict=True)]
    draw, config = torch.Generator().manual_seed(5), SimpleNamespace(**{**vars(CONFIG), "loss_agg_mode": mode})
    flat = torch.randn(sum(sizes), generator=draw)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    plugins = Plugins([Ravl(Ravl.Config(members=1))])
    plugins.add_fallback(CriticDefaults())
    ours = PluginValueLoss(plugins, config, SimpleNamespace())
    found = []
    for loss in (lambda *given: value_loss(config, *given), ours):
        leaf = flat.clone().requires_grad_()
        output = {"values": torch.nested.nested_tensor_from_jagged(leaf, offsets)}
        total, metrics = loss(output, micro_batch(tokens=30))
        total.backward()
        found.append((total.detach(), leaf.grad, {name: metric for name, metric in metrics.items()}))
    (theirs, their_grad, their_metrics), (mine, my_grad, my_metrics) = found
    assert torch.equal(mine, theirs) and torch.equal(my_grad, their_grad) and my_grad.any()
    assert my_metrics.keys() == their_metrics.keys()
    for name in ("critic/vf_clipfrac", "critic/vpred_mean"):
        assert my_metrics[name] == pytest.approx(their_metrics[name], rel=1e-6)
    assert my_metrics["critic/vf_loss"].values == their_metrics["critic/vf_loss"].values


def test_mini_batches_are_counted_within_a_step() -> None:
    loss = PluginValueLoss(Plugins([]), CONFIG, SimpleNamespace(get_data_parallel_group=lambda: None))
    seen = []
    for step in (1, 1, 2):
        data = tu.get_tensordict({}, {"verl_plugins_step": step})
        assert loss.train_batch(lambda data: seen.append((loss.step, loss.mini_batch)), data) is None
    assert seen == [(1, 0), (1, 1), (2, 0)]


class TestRanks:
    """The engine of three heads, on one rank and on two."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("value_heads")
        for part in (make_model(), make_tokenizer()):
            part.save_pretrained(folder / "model")
        for ranks in ("1", "2"):
            asked = [sys.executable, SCRIPT, ranks, "3", folder]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
        return folder

    def of_ranks(self, folder: Path, ranks: int) -> list[dict[str, Any]]:
        return [torch.load(folder / f"{ranks}_3_{rank}.pt", weights_only=True) for rank in range(ranks)]

    def test_every_position_has_a_value_of_each_head(self, folder: Path) -> None:
        (one,), two = self.of_ranks(folder, 1), self.of_ranks(folder, 2)
        both = [row for found in two for row in found["values"]]
        assert len(one["values"]) == len(both) == 8
        for alone, shared in zip(one["values"], both, strict=True):
            assert alone.shape[1] == 3
            torch.testing.assert_close(alone, shared, atol=1e-5, rtol=1e-5)

    def test_loss_and_gradients_are_those_of_one_rank_diversity_included(self, folder: Path) -> None:
        (one,), two = self.of_ranks(folder, 1), self.of_ranks(folder, 2)
        assert sum(found["loss"] for found in two) / 2 == pytest.approx(one["loss"], rel=1e-5)
        for name, gradient in one["grads"].items():
            torch.testing.assert_close(two[0]["grads"][name], gradient, atol=1e-5, rtol=1e-4)
        assert one["told"] == {"plugins/ravl/diversity": pytest.approx(float(diversity(layer(3))), rel=1e-4)}
        assert one["told"] == {key: pytest.approx(value, rel=1e-4) for key, value in two[1]["told"].items()}

    def test_the_gradient_of_diversity_reaches_the_heads(self, folder: Path) -> None:
        """Without it, and with it, the gradient of the last layer worked out from the model's own hidden states."""
        (one,) = self.of_ranks(folder, 1)
        leaf = layer(3).requires_grad_()
        (ETA * diversity(leaf)).backward()
        assert leaf.grad.abs().max() > 0.01
        without = one["grads"]["score.weight"] - leaf.grad
        torch.testing.assert_close(without, self.regressed(), atol=1e-4, rtol=1e-3)

    def regressed(self) -> torch.Tensor:
        from engine_of_ranks import rows

        model, weight = make_model().eval().model, layer(3).requires_grad_()
        total, tokens = torch.zeros(()), sum(int(mask.sum()) for _, _, mask in rows())
        for (prompt, response, mask), old, returns in zip(rows(), *known(3), strict=True):
            with torch.no_grad():
                hidden = model(torch.cat([prompt, response])[None]).last_hidden_state[0, len(prompt) - 1 : -1]
            new = hidden @ weight.T
            near = new.clamp(old - CLIP, old + CLIP)
            each = 0.5 * torch.maximum((new - returns[:, None]) ** 2, (near - returns[:, None]) ** 2)
            total = total + (each.sum(-1) * mask).sum()
        (total / tokens).backward()
        return weight.grad

    def test_the_copy_of_the_weights_is_not_kept_where_nothing_is_learnt(self, folder: Path) -> None:
        assert all(found["kept"] for ranks in (1, 2) for found in self.of_ranks(folder, ranks))
