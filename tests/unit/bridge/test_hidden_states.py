"""Hidden states in verl's pass for the old log-probs: those of plain Transformers, row by row, and gone afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_of_ranks import rows
from hidden_of_ranks import KEYS, SEED, TOKENS
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_plugins.bridge import hidden, sending
from verl_plugins.bridge.hidden import (
    ARGMAX,
    FEATURES,
    HEAD_ROWS,
    LABELS,
    LAYERS,
    MEASURED_STEP,
    PLACES,
    POOLED,
    decoder_layers,
)
from verl_plugins.bridge.sending import SendsRows
from verl_plugins.cpu.model import make_model, make_tokenizer
from verl_plugins.diagnostics.classes import by_class, quotient
from verl_plugins.errors import CompositionError, RunError
from verl_plugins.hidden import Hidden, Wish, chosen_places, united

SCRIPT = Path(__file__).with_name("hidden_of_ranks.py")
ENGINES = ("ours", "verl's", "lora")
PATHS = ("", ", prompts sent", ", packed", ", fixed size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and what one rank and two have returned."""
    folder = tmp_path_factory.mktemp("hidden")
    for part in (make_model(), make_tokenizer()):
        part.save_pretrained(folder / "model")
    for ranks in ("1", "2"):
        done = subprocess.run([sys.executable, SCRIPT, ranks, folder], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def of_ranks(folder: Path, ranks: int, name: str) -> dict[str, torch.Tensor]:
    """What all ranks returned, in the order of the rows."""
    found = [torch.load(folder / f"hidden_{ranks}_{rank}.pt", weights_only=True)[name] for rank in range(ranks)]
    order = torch.cat([one["rows"] for one in found]).argsort()
    return {
        key: torch.cat([one[key] for one in found])[order] for key in found[0] if key not in ("log_probs", "entropy")
    }


@pytest.fixture(scope="module")
def plain() -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Of each row, by Transformers alone: states [layers + 1, response, D] that predict the response, logits, masks."""
    model, found = make_model().eval(), []
    for prompt, response, mask in rows():
        with torch.no_grad():
            output = model(torch.cat([prompt, response])[None], output_hidden_states=True)
        states = torch.stack([state[0, len(prompt) - 1 : -1] for state in output.hidden_states])
        found.append((states, output.logits[0, len(prompt) - 1 : -1], mask.bool()))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("engine", ENGINES)
def test_states_are_those_of_plain_transformers(folder: Path, plain: Any, engine: str, path: str, ranks: int) -> None:
    found, model = of_ranks(folder, ranks, engine + path), make_model()
    depth = model.config.num_hidden_layers
    layers = [*range(2, depth, 2), depth]
    for row, ((states, logits, mask), (_, response, _)) in enumerate(zip(plain, rows(), strict=True)):
        assert found[LAYERS][row].tolist() == layers
        mean = states[layers][:, mask].mean(1) if mask.any() else torch.zeros(len(layers), states.shape[-1])
        torch.testing.assert_close(found[POOLED][row], mean, atol=1e-5, rtol=0)
        for draw, place in enumerate(found[PLACES][row].tolist()):
            if place < 0:
                assert not found[FEATURES][row, draw].any()
                continue
            assert mask[place]
            torch.testing.assert_close(found[FEATURES][row, draw], states[layers, place], atol=1e-5, rtol=0)
            assert found[LABELS][row, draw] == response[place]
            head = model.get_output_embeddings().weight[response[place]]
            torch.testing.assert_close(found[HEAD_ROWS][row, draw], head, atol=0, rtol=0)
            assert found[ARGMAX][row, draw] == logits[place].argmax()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["step 2", "not asked"])
def test_steps_that_nobody_wished_for_cost_nothing(folder: Path, engine: str, name: str) -> None:
    found = of_ranks(folder, 1, f"{engine}, {name}")
    assert set(found) == {PLACES, "rows"}
    assert torch.load(folder / "hidden_1_0.pt", weights_only=True)[f"{engine}, hooks left"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_identical_rollouts_have_a_quotient_of_zero(folder: Path, engine: str) -> None:
    found = of_ranks(folder, 1, f"{engine}, alike")
    assert sorted(found["rows"].tolist()) == [1, 1, 1, 4, 4, 4]
    assert (quotient(by_class(found[POOLED], found["rows"])) < 1e-9).all()


class TestChoice:
    MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    KEYS = ("4-1-0_0_0", "4-1-0_1_0", "9-1-1_0_0")

    def test_of_generated_tokens_each_once(self) -> None:
        places = chosen_places(self.KEYS, self.MASK, 3, 0)
        for row, (chosen, mask) in enumerate(zip(places.tolist(), self.MASK, strict=True)):
            taken = [place for place in chosen if place >= 0]
            assert len(taken) == len(set(taken)) == min(3, int(mask.sum())), row
            assert mask[taken].all() and chosen[len(taken) :] == [-1] * (3 - len(taken))

    def test_of_what_the_row_is_and_of_nothing_else(self) -> None:
        places = chosen_places(self.KEYS, self.MASK, 3, 0)
        turned = chosen_places(self.KEYS[::-1], self.MASK.flip(0), 3, 0).flip(0)
        wider = chosen_places(self.KEYS[:2], torch.nn.functional.pad(self.MASK[:2], (0, 4)), 3, 0)
        assert torch.equal(turned, places) and torch.equal(wider, places[:2])

    def test_fewer_tokens_are_the_first_of_more(self) -> None:
        whole = chosen_places(self.KEYS, self.MASK, 4, 0)
        assert torch.equal(chosen_places(self.KEYS, self.MASK, 2, 0), whole[:, :2])

    def test_another_seed_and_another_row_choose_otherwise(self) -> None:
        mask = torch.ones(20, 50)
        keys = [f"{row}-1-{row}_0_0" for row in range(20)]
        one, other = chosen_places(keys, mask, 4, 0), chosen_places(keys, mask, 4, 1)
        assert not torch.equal(one, other) and len({tuple(row) for row in one.tolist()}) == 20
        assert abs(float(one.float().mean()) - 24.5) < 6

    def test_more_are_wished_for_than_there_is_room(self) -> None:
        assert chosen_places(["1-1-0_0_0"], torch.ones(1, 2), 4, 0)[0, 2:].tolist() == [-1, -1]


class TestWish:
    def test_due_in_the_first_step_and_then_every_so_many(self) -> None:
        assert [step for step in range(1, 9) if Wish(every=3).due(step)] == [1, 4, 7]

    @pytest.mark.parametrize(
        ("stride", "depth", "expected"),
        [(None, 6, (6,)), (1, 3, (1, 2, 3)), (4, 6, (4, 6)), (3, 6, (3, 6)), (9, 6, (6,))],
    )
    def test_layers(self, stride: int | None, depth: int, expected: tuple[int, ...]) -> None:
        assert Wish(layer_step=stride).layers(depth) == expected

    def test_what_is_due_is_united(self) -> None:
        asked = united([Wish(2, 1, 2), Wish(5, 2, 3, head_rows=True), Wish(9, 3, argmax=True)], 3)
        assert (asked.tokens, asked.head_rows, asked.argmax, asked.layers(7)) == (5, True, False, (2, 3, 4, 6, 7))
        assert united([Wish(every=2), Wish(every=3)], 6) is None and united([], 1) is None

    @pytest.mark.parametrize("wrong", [{"tokens": -1}, {"every": 0}, {"layer_step": 0}])
    def test_too_small(self, wrong: dict[str, int]) -> None:
        with pytest.raises(CompositionError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}: it must be at"):
            Wish(**wrong)

    def test_each_gets_what_it_wished_for_whatever_others_have(self) -> None:
        states = torch.arange(5.0)[:, None, None] + torch.tensor([10.0, 20.0, 30.0])[:, None]
        known = dict(row=torch.tensor([0, 0, 0, 1, 1]), position=torch.arange(5), draw=torch.tensor([0, 1, 2, 0, 1]))
        known |= dict(label=torch.arange(5) + 7, argmax=torch.arange(5), head_row=states[:, 0], pooled=states[:2])
        whole = Hidden(layers=(1, 2, 4), features=states, **known)
        mine = Wish(tokens=1, every=2, layer_step=2).of(whole, 3)
        assert mine.layers == (2, 4) and mine.features[..., 0].tolist() == [[20, 30], [23, 33]]
        assert mine.label.tolist() == [7, 10] and mine.argmax.tolist() == [0, 3] and mine.row.tolist() == [0, 1]
        assert mine.pooled[..., 0].tolist() == [[20, 30], [21, 31]] and mine.head_row.tolist() == [[10], [13]]
        assert mine.position.tolist() == [0, 3] and mine.draw.tolist() == [0, 0]
        assert Wish(every=2).of(whole, 2) is None and Wish().of(None, 1) is None
        assert whole.first(4).tolist() == [0, 3, 1, 4] and whole.first(99).tolist() == [0, 3, 1, 4, 2]
        assert Wish(tokens=0, layer_step=1).of(replace_layers(whole), 1).first(3).tolist() == []


def replace_layers(hidden: Hidden) -> Hidden:
    """The same three layers as a model of three."""
    return Hidden(**{**vars(hidden), "layers": (1, 2, 3)})


class Queue:
    """TransferQueue in this process: columns by name, and the bytes of each message that leaves it."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns, self.sent = columns, []

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> TensorDict:
        names = list(self.columns) if select_fields is None else select_fields
        found = {name: self.columns[name] for name in names}
        self.sent.append({name: _bytes(values) for name, values in found.items()})
        return TensorDict(found, batch_size=len(keys))

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> KVBatchMeta:
        self.columns |= dict(fields.items())
        return KVBatchMeta(keys, tags=[{}] * len(keys), partition_id=partition_id, fields=list(self.columns))


def _bytes(values: torch.Tensor) -> int:
    values = values.values() if values.is_nested else values
    return values.numel() * values.element_size()


def nested(*lengths: int) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.ones(length) for length in lengths], layout=torch.jagged)


class Pass:
    """verl's stage, with workers that return hidden states if they are told to."""

    WIDTH = 64

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        self.fetched = sending.tq.kv_batch_get(batch.keys, "train", batch.fields)
        step, size = batch.extra_info.get(MEASURED_STEP), len(batch)
        self.steps.append(step)
        fields = {"old_log_probs": torch.zeros(size, 2)}
        if step:
            k = self.fetched[PLACES].shape[1]
            fields |= {
                LAYERS: torch.tensor([[2, 4]] * size),
                FEATURES: torch.randn(size, k, 2, self.WIDTH).bfloat16(),
                POOLED: torch.randn(size, 2, self.WIDTH).bfloat16(),
                LABELS: torch.ones(size, k).long(),
            }
        meta = sending.tq.kv_batch_put(batch.keys, "train", TensorDict(fields, batch_size=size))
        meta.extra_info = batch.extra_info
        return meta

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        self.steps.append(batch.extra_info.get(MEASURED_STEP))
        self.fetched = sending.tq.kv_batch_get(batch.keys, "train", batch.fields)
        return batch


class Trainer(SendsRows, Pass):
    def __init__(self, step: int, wishes: list[Wish]) -> None:
        self.plugins = [SimpleNamespace(needs={"hidden_states"}, hidden_wish=lambda wish=wish: wish) for wish in wishes]
        self.needs, self.seed, self.global_steps, self.processor = {"hidden_states"}, 0, step, None
        self._shipped, self._past, self.steps = set(), {}, []
        self._columns = {"input_ids", "loss_mask", "response_mask"}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    found = Queue(input_ids=nested(4, 6), loss_mask=nested(2, 3), response_mask=nested(2, 3))
    for module in (hidden, sending):
        monkeypatch.setattr(module, "tq", found)
    return found


class TestDriver:
    KEYS = ("0-1-0_0_0", "0-1-0_1_0")

    def meta(self) -> KVBatchMeta:
        return KVBatchMeta(list(self.KEYS), tags=[{}] * 2, partition_id="train", fields=None)

    def test_read_once_and_sent_to_no_worker_again(self, queue: Queue) -> None:
        trainer = Trainer(1, [Wish(tokens=2, layer_step=2)])
        batch = trainer._compute_old_log_prob(self.meta(), {})
        assert set(trainer.fetched.keys()) == {"input_ids", "loss_mask", PLACES}
        before = max(message.get(FEATURES, 0) for message in queue.sent)
        assert before == 2 * 2 * 2 * Pass.WIDTH * 2
        taken = trainer._hidden.of(self.KEYS[::-1])
        assert taken.features.shape == (4, 2, Pass.WIDTH) and taken.row.tolist() == [0, 0, 1, 1]
        trainer._compute_ref_log_prob(batch, {})
        assert set(trainer.fetched.keys()) == {"input_ids", "loss_mask"}
        everything = queue.kv_batch_get(list(self.KEYS), "train")  # a critic of verl's asks for all there is
        assert sum(_bytes(everything[name]) for name in (FEATURES, POOLED, LABELS, LAYERS, PLACES)) <= 2 * 4 * 8

    def test_the_second_pass_of_a_reference_in_the_actor_takes_nothing(self, queue: Queue) -> None:
        trainer = Trainer(1, [Wish()])
        trainer._compute_ref_log_prob(trainer._compute_old_log_prob(self.meta(), {}), {})
        assert trainer.steps == [1, None]

    def test_nothing_is_sent_or_kept_in_the_steps_between(self, queue: Queue) -> None:
        trainer = Trainer(1, [Wish(every=2)])
        trainer._compute_old_log_prob(self.meta(), {})
        assert trainer._hidden is not None
        trainer.global_steps, queue.sent = 2, []
        trainer._compute_old_log_prob(self.meta(), {})
        assert trainer._hidden is None and trainer.steps == [1, None] and len(queue.sent) == 1
        assert set(queue.sent[0]) == {"input_ids", "loss_mask"}


def test_a_model_without_a_list_of_layers() -> None:
    model = SimpleNamespace(get_decoder=lambda: torch.nn.Linear(1, 1))
    with pytest.raises(RunError, match="SimpleNamespace has no list of its 5 decoder layers: switch"):
        decoder_layers(model, 5)


def test_places_of_the_ranks_are_those_of_the_driver(folder: Path) -> None:
    mask = torch.nn.utils.rnn.pad_sequence([mask for _, _, mask in rows()], batch_first=True)
    expected = chosen_places(KEYS, mask, TOKENS, SEED)
    for ranks in (1, 2):
        assert torch.equal(of_ranks(folder, ranks, "ours")[PLACES], expected)
