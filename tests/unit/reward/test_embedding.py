"""Embeddings: in order, equal for equal texts, and no kind stands in for another."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_plugins import CompositionError
from verl_plugins.errors import RunError
from verl_plugins.reward import embedding
from verl_plugins.reward.embedding import LONGEST_GRAM, WIDTH, embedder, hashed

TEXTS = st.lists(st.text(max_size=12), max_size=6)


class TestHashing:
    @given(TEXTS, st.randoms())
    def test_a_text_is_embedded_alike_wherever_it_stands(self, texts, random):
        order = random.sample(range(len(texts)), len(texts))
        assert (hashed([texts[place] for place in order]) == hashed(texts)[order]).all()

    @given(TEXTS)
    def test_every_neighbourhood_counts_once_and_none_reaches_into_another_text(self, texts):
        found = hashed(texts)
        assert found.shape == (len(texts), WIDTH)
        sizes = [len(text.encode()) for text in texts]
        assert found.sum(1).tolist() == [sum(max(size - gram, 0) for gram in range(LONGEST_GRAM)) for size in sizes]

    def test_more_alike_is_nearer(self):
        a, b, c = hashed(["we add 7 to both sides", "we add 9 to both sides", "by the sine rule"])
        cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
        assert cosine(a, b) > 0.9 > 0.7 > cosine(a, c)


def count_vowels(texts: list[str]) -> list[list[int]]:
    return [[sum(sign in "aeiou" for sign in text), len(text)] for text in texts]


class TestCallable:
    def test_a_function_of_ones_own(self):
        found = embedder("callable", f"{__name__}:count_vowels")(["abe", "x"])
        assert found.tolist() == [[2, 3], [0, 1]]

    @pytest.mark.parametrize("source", ["", "no_such_module:f", f"{__name__}:gone", "justaname"])
    def test_what_is_not_there_is_said_at_once(self, source):
        with pytest.raises(CompositionError, match="source"):
            embedder("callable", source)

    @pytest.mark.parametrize("given", [[[1.0]], [1.0, 2.0], [[1.0], [float("nan")]]])
    def test_an_answer_that_cannot_be_is_refused(self, given, monkeypatch):
        monkeypatch.setitem(globals(), "odd", lambda texts: given)
        with pytest.raises(RunError, match="for 2 texts"):
            embedder("callable", f"{__name__}:odd")(["a", "b"])


class TestService:
    @pytest.fixture
    def service(self, monkeypatch):
        """Answers with the length of each text, but for the first `failures` times."""
        monkeypatch.setattr(embedding.time, "sleep", lambda _: None)
        asked, failures = [], [0]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
                asked.append(len(texts))
                failures[0] -= 1
                self.send_response(503 if failures[0] >= 0 else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"embeddings": [[float(len(text)), 1.0] for text in texts]}).encode())

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/embed", asked, failures
        server.shutdown()

    def test_many_texts_are_asked_in_parts_and_come_back_in_order(self, service):
        address, asked, _ = service
        found = embedder("http", address)(["x" * n for n in range(300)])
        assert found[:, 0].tolist() == [*range(300)] and asked == [128, 128, 44]

    def test_a_service_that_fails_now_and_then_is_asked_again(self, service):
        address, asked, failures = service
        failures[0] = 2
        assert embedder("http", address)(["abc"])[0, 0] == 3 and len(asked) == 3

    def test_one_that_fails_for_good_ends_it(self, service):
        address, _, failures = service
        failures[0] = 99
        with pytest.raises(RunError, match="no embeddings in 5 tries .*503"):
            embedder("http", address)(["abc"])

    def test_no_texts_ask_nothing(self, service):
        assert len(embedder("http", service[0])([])) == 0 and not service[1]

    def test_an_address_is_asked_for(self):
        with pytest.raises(CompositionError, match="http://"):
            embedder("http", "localhost:80")


class TestFolder:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A tiny BERT that reads eight tokens at once."""
        import torch
        from transformers import BertConfig, BertModel, BertTokenizerFast

        folder = tmp_path_factory.mktemp("bert")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        BertModel(config).save_pretrained(folder)
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
        return folder

    def test_padding_changes_nothing(self, folder):
        embed = embedder("folder", str(folder))
        alone, among = embed(["a b c"])[0], embed(["d", "a b c", "a b c d e f"])[1]
        assert alone == pytest.approx(among, abs=1e-5)

    def test_of_a_long_text_all_windows_count(self, folder):
        embed = embedder("folder", str(folder))
        long = "a b c d e f " + "g h a b c d " + "e f g h a b"
        first, second, third = embed(["a b c d e f", "g h a b c d", "e f g h a b"])
        assert embed([long])[0] == pytest.approx((first + second + third) / 3, abs=1e-5)

    def test_or_only_its_end(self, folder):
        embed = embedder("folder", str(folder), "tail")
        assert embed(["a b c d e f g h a b c d"])[0] == pytest.approx(embed(["g h a b c d"])[0], abs=1e-5)

    def test_a_folder_without_a_model_is_said_at_once(self, tmp_path):
        with pytest.raises(CompositionError, match=r"no config\.json"):
            embedder("folder", str(tmp_path))
