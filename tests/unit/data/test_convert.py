"""A user's data file becomes parquet in verl's schema, and nothing is lost on the way without a word."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from verl_plugins.batch import Batch
from verl_plugins.composition.override import parse
from verl_plugins.data import rows as rows_module
from verl_plugins.data.convert import Options, convert
from verl_plugins.data.report import Report, print_report
from verl_plugins.errors import DataError
from verl_plugins.reward.final_answer import last_boxed
from verl_plugins.reward.math_verify import MathVerify
from verl_plugins.services import Answer, Prompt

SAMPLES = Path(__file__).parents[2] / "data"


def written(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


def truths(path: Path) -> list[str]:
    return [row["reward_model"]["ground_truth"] for row in written(path)]


def solutions(path: Path) -> list[str | None]:
    return [row["extra_info"]["solution"] for row in written(path)]


def ids(path: Path) -> dict[str, str]:
    """Prompt id of each question."""
    return {row["prompt"][-1]["content"]: row["extra_info"]["prompt_id"] for row in written(path)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet"


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON Lines; text is written as it is."""

    def write(*rows: Any, name: str = "in.jsonl") -> Path:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def refuses(tmp_path: Path, out: Path, sentence: Callable[..., None]) -> Callable[..., None]:
    """Converting ends in one sentence with these parts, and leaves no file behind."""

    def check(file: Path, *parts: str, to: Path = out, **options: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError) as caught:
            convert(file, to, Options(**options))
        sentence(caught.value, *parts)
        assert sorted(tmp_path.rglob("*")) == before

    return check


def plain(count: int) -> list[dict[str, str]]:
    return [{"question": f"{number}+1=", "answer": str(number + 1)} for number in range(count)]


def braced(parts: list[str]) -> str:
    """LaTeX whose braces are balanced, apart from escaped ones."""
    return "".join(rf"\x{{{part}}}\}}" for part in parts)


class TestShapes:
    """The three samples, recognised by their columns."""

    def test_gsm8k(self, out: Path) -> None:
        report = convert(SAMPLES / "gsm8k.jsonl", out)
        assert truths(out) == ["14", "1234", "-5", "7.5", "6"]
        assert solutions(out)[0] == "The boxes hold 3*4=12 pens.\nWith those she keeps that is 12+2=14 pens."
        assert solutions(out)[1] == "It owns 1150+84=1,234 books."
        assert (report.read, report.train, report.solutions) == (5, 5, 5)
        assert str(report.columns) == "gsm8k (question, answer)"

    def test_math(self, out: Path) -> None:
        report = convert(SAMPLES / "math.jsonl", out)
        assert truths(out) == [r"\frac{3}{4}", r"2\sqrt{3}", "(1, 2)", r"$\{-3, 3\}$"]
        assert solutions(out)[0].endswith(r"\boxed{\frac{3}{4}}$.")
        assert report.not_kept == ["level", "type"]

    def test_dapo(self, out: Path) -> None:
        report = convert(SAMPLES / "dapo.jsonl", out)
        assert truths(out) == ["100", "8", "100"]
        assert {(row["data_source"], row["ability"]) for row in written(out)} == {("math_dapo", "MATH")}
        assert written(out)[1]["prompt"][0]["content"].endswith("How many prime numbers are below 20?")
        assert (report.duplicates, report.contradictions) == (1, 0)
        assert report.not_kept == ["extra_info.index"]

    def test_processed_dapo_has_the_answer_in_solution(self, lines: Any, out: Path) -> None:
        convert(lines({"prompt": "How many days has a week?", "solution": "7"}), out)
        assert (truths(out), solutions(out)) == (["7"], [None])
        assert written(out)[0]["prompt"] == [{"role": "user", "content": "How many days has a week?"}]

    def test_math_prefers_the_answer_column_where_it_is_filled(self, lines: Any, out: Path) -> None:
        both = {"problem": "1+1?", "answer": "2", "solution": r"Surely \boxed{3}."}
        convert(lines(both, {**both, "problem": "2+1?", "answer": None}), out)
        assert truths(out) == ["2", "3"]

    def test_answers_alone(self, lines: Any, out: Path) -> None:
        report = convert(lines({"problem": "a?", "answer": 12}, {"problem": "b?", "answer": 2.0}), out)
        assert (truths(out), solutions(out)) == (["12", "2"], [None, None])
        assert report.columns.shape == "plain"

    def test_columns_named_by_flags(self, lines: Any, out: Path) -> None:
        file = lines({"q": "1+1?", "a": "One and one is <<1+1=2>>2.\n#### 2", "prompt": "ignored"})
        convert(file, out, Options(question="q", answer="a"))
        assert (truths(out), solutions(out)) == (["2"], ["One and one is 2."])
        convert(
            lines({"q": "1+1?", "a": "2", "work": "Count."}), out, Options(question="q", answer="a", solution="work")
        )
        assert (truths(out), solutions(out)) == (["2"], ["Count."])

    def test_a_key_inside_a_column(self, lines: Any, out: Path) -> None:
        convert(
            lines({"text": {"ask": "1+1?"}, "gold": {"value": 2}}),
            out,
            Options(question="text.ask", answer="gold.value"),
        )
        assert truths(out) == ["2"]
        assert list(ids(out)) == ["1+1?"]

    def test_a_named_shape_is_not_guessed(self, lines: Any, refuses: Any, out: Path) -> None:
        file = lines({"question": "1+1?", "answer": "2 #### 3"})
        convert(file, out, Options(shape="plain"))
        assert truths(out) == ["2 #### 3"]

    def test_unclear_columns_are_listed(self, lines: Any, refuses: Any) -> None:
        refuses(lines({"query": "1+1?", "target": "2"}), "query, target", "--question")
        refuses(lines({"question": "1+1?", "target": "2"}), "question, target", "--answer")
        refuses(lines({"question": "1+1?", "answer": "2"}), "--answer anser", "did you mean 'answer'", answer="anser")
        refuses(lines({"question": "1+1?", "answer": "2"}), "--shape gsm9k", "'gsm8k'", shape="gsm9k")
        refuses(lines({"question": "1+1?", "answer": "2"}), "--id", "no such column", id="uuid")
        gsm8k = {"question": "1+1?", "answer": "#### 2", "work": "Count."}
        refuses(lines(gsm8k), "--solution work", "before ####", shape="gsm8k", solution="work")


class TestBoxed:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"\boxed{42}", "42"),
            (r"first \boxed{1}, then \boxed{2}.", "2"),
            (r"\boxed{\frac{\sqrt{2}}{3}} and more {braces}", r"\frac{\sqrt{2}}{3}"),
            (r"\fbox{7}", "7"),
            (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
            (r"\boxed {5}", "5"),
            (r"it is $\boxed 5$.", "5"),
            (r"\boxedtext{5}", None),
            (r"\boxed{5", None),
            ("5", None),
        ],
    )
    def test_the_last_one_with_its_braces(self, text: str, answer: str | None) -> None:
        assert last_boxed(text) == answer

    @given(st.recursive(st.text("ab1 ", max_size=3), lambda inner: st.lists(inner, max_size=3).map(braced)))
    def test_balanced_content_comes_back(self, content: str) -> None:
        assert last_boxed(rf"So \boxed{{0}} or rather $\boxed{{{content}}}$, {{as said}}") == content.strip()


class TestScoring:
    """The default scorer understands the answers that come out."""

    @pytest.mark.parametrize("sample", ["gsm8k", "math", "dapo"])
    def test_the_answer_in_a_box_is_right_and_another_is_wrong(self, sample: str, out: Path) -> None:
        convert(SAMPLES / f"{sample}.jsonl", out)
        scorer = MathVerify(MathVerify.Config())
        for row in written(out):
            truth, source = row["reward_model"]["ground_truth"], row["data_source"]
            right = scorer.score_answer(Answer(rf"So it is $\boxed{{{truth.strip('$')}}}$.", truth, source))
            wrong = scorer.score_answer(Answer(r"So it is $\boxed{2}$.", truth, source))
            assert (right.correct, wrong.correct) == (True, False), truth

    def test_sources_whose_answers_verl_would_execute_are_refused(self, lines: Any, refuses: Any, out: Path) -> None:
        row = {"data_source": "numina_olympiads", "problem": "1+1?", "answer": "2"}
        refuses(lines(row), "row 1", "'numina_olympiads'", "--data-source")
        refuses(lines(row), "--data-source", "'numina_mine'", data_source="numina_mine")
        convert(lines(row), out, Options(data_source="olympiads"))
        assert written(out)[0]["data_source"] == "olympiads"

    def test_data_without_a_source_gets_a_name_that_no_scorer_of_verl_claims(self, lines: Any, out: Path) -> None:
        convert(lines(*plain(1)), out)
        assert written(out)[0]["data_source"] == "own/plain"


class TestDisagreement:
    """A worked solution that marks another answer than the row has."""

    @pytest.mark.parametrize(
        ("solution", "answer", "disagrees"),
        [
            (r"So \boxed{3}.", "2", True),
            (r"So \boxed{\frac{4}{2}}.", "2", False),
            ("Hence the answer is 2.5.", "5/2", False),
            ("Hence the answer is 2.6.", "5/2", True),
            ("We add 1 and 2 and get 4 in the end.", "3", False),
            (r"So \boxed{∇}.", "2", False),
            (r"So \boxed{2√3}.", r"\sqrt{12}", False),
            (r"So \boxed{C}.", "D", True),
        ],
    )
    def test_is_counted_and_the_answer_stays(
        self, lines: Any, out: Path, solution: str, answer: str, disagrees: bool
    ) -> None:
        report = convert(lines({"problem": "?", "answer": answer, "solution": solution}), out)
        assert truths(out) == [answer]
        assert [found.row for found in report.disagreements] == [1] * disagrees
        assert dict(report.numbers())["… that ends with another answer"] == disagrees

    def test_the_report_names_the_rows(self, lines: Any, out: Path) -> None:
        rows = [{"problem": f"{n}?", "answer": str(n), "solution": rf"\boxed{{{n + (n > 1)}}}"} for n in range(9)]
        report = convert(lines(*rows), out)
        console = Console(width=200, record=True, file=io.StringIO())
        print_report(report, console)
        text = console.export_text()
        assert "solution and answer disagree" in text
        assert "row 3 (solution '3', answer '2')" in text and "and 2 more" in text


class TestUnanswered:
    ROWS = (
        {"question": "a?", "answer": "work #### 1"},
        {"question": "b?", "answer": "work without a mark"},
        {"question": "", "answer": "#### 3"},
        {"question": "d?", "answer": "work ####  "},
        {"question": "e?"},
        {"question": "f?", "answer": ["#### 6"]},
        {"question": "g?", "answer": "#### \ud800"},
        {"question": "h?", "answer": float("nan")},
    )

    def test_nothing_is_written_and_the_rows_are_named(self, lines: Any, refuses: Any) -> None:
        reasons = ("row 2 (no #### in column answer)", "row 3 (column question is empty)", "row 4 (nothing after ####")
        refuses(lines(*self.ROWS), "7 of 8 rows", *reasons, "and 2 more", "--skip-unanswered")

    def test_they_are_left_out_on_request_and_counted(self, lines: Any, out: Path) -> None:
        report = convert(lines(*self.ROWS), out, Options(skip_unanswered=True))
        assert truths(out) == ["1"]
        assert [number for number, _ in report.unanswered] == [2, 3, 4, 5, 6, 7, 8]
        assert dict(report.unanswered)[6] == "column answer holds a list, not text or a number"
        assert report.read == report.train + len(report.unanswered)

    def test_a_file_without_any_answer_is_refused_even_so(self, lines: Any, refuses: Any) -> None:
        rows = [{"problem": "a?", "solution": "no box"}, {"problem": "b?", "solution": r"\boxed{}"}]
        reasons = (
            r"row 1 (no \boxed{…} in column solution)",
            r"row 2 (the last \boxed{…} in column solution is empty)",
        )
        refuses(lines(*rows), "no row", *reasons, skip_unanswered=True)

    @pytest.mark.parametrize("word", ["N/A", "none", "Unknown", r"\text{N/A}", "---", "?", "TBD", "[]"])
    def test_words_that_stand_for_no_answer_are_none(self, lines: Any, refuses: Any, word: str) -> None:
        refuses(lines(*plain(1), {"question": "b?", "answer": word}), "row 2", "stands for no answer", "--unlabelled")

    @pytest.mark.parametrize("answer", ["no solution", "0", "Na", "undefined"])
    def test_words_that_answer_are_kept(self, lines: Any, out: Path, answer: str) -> None:
        convert(lines({"question": "b?", "answer": answer}), out)
        assert truths(out) == [answer]

    def test_questions_without_answer_are_kept_on_demand(self, lines: Any, out: Path) -> None:
        rows = [*plain(1), {"question": "b?", "answer": None}, {"question": "c?", "answer": "N/A"}, {"question": "d?"}]
        report = convert(lines(*rows), out, Options(unlabelled=True))
        assert truths(out) == ["1", "", "", ""]
        assert (report.unlabelled, report.unanswered) == (3, [])

    def test_a_file_of_nothing_but_questions(self, lines: Any, out: Path, refuses: Any) -> None:
        rows = lines({"question": "a?"}, {"question": "b?"})
        refuses(rows, "--answer", "--unlabelled")
        assert convert(rows, out, Options(unlabelled=True)).train == 2

    def test_keeping_and_leaving_out_exclude_each_other(self, lines: Any, refuses: Any) -> None:
        refuses(lines(*plain(1)), "--unlabelled", "--skip-unanswered", unlabelled=True, skip_unanswered=True)

    def test_a_row_without_a_question_is_refused_even_so(self, lines: Any, refuses: Any) -> None:
        refuses(lines(*plain(1), {"question": "", "answer": "1"}), "row 2", "is empty", unlabelled=True)

    def test_row_numbers_are_lines_of_the_file(self, lines: Any, refuses: Any) -> None:
        refuses(lines(plain(1)[0], "", {"question": "b?", "answer": ""}), "row 3 (column answer is empty)")


class TestPromptIds:
    def test_they_do_not_change_when_rows_are_added_or_the_wording_around_them_changes(
        self, lines: Any, out: Path
    ) -> None:
        convert(lines(*plain(5)), out)
        before = ids(out)
        convert(lines({"question": "0+0=", "answer": "0"}, *reversed(plain(9))), out)
        assert before.items() <= ids(out).items()
        convert(lines(*plain(5)), out, Options(system="Think.", suffix="Put the answer in a box."))
        assert sorted(ids(out).values()) == sorted(before.values())
        assert len(set(before.values())) == 5

    def test_a_question_that_is_asked_again_is_numbered(self, lines: Any, out: Path) -> None:
        convert(lines(*plain(2), *plain(2), *plain(1)), out)
        names = [row["extra_info"]["prompt_id"] for row in written(out)]
        assert names == [names[0], names[1], f"{names[0]}-2", f"{names[1]}-2", f"{names[0]}-3"]

    def test_a_column_of_ids(self, lines: Any, out: Path) -> None:
        convert(SAMPLES / "dapo.jsonl", out, Options(id="extra_info.index"))
        start = "6f1c1c52-8a6b-4a39-9d0e-0d5f3a1b7c0"
        assert [row["extra_info"]["prompt_id"] for row in written(out)] == [f"{start}1", f"{start}2", f"{start}1-2"]

    def test_one_id_for_two_prompts_is_refused(self, lines: Any, refuses: Any) -> None:
        rows = [{**row, "name": "x"} for row in plain(2)]
        refuses(lines(*rows), "rows 1 and 2", "'x'", "--id", id="name")
        a, b = plain(2)
        refuses(lines({**a, "name": "x"}, {**b, "name": "x-2"}, {**a, "name": "x"}), "rows 2 and 3", "'x-2'", id="name")
        refuses(lines({**a, "name": "x"}, {**b, "name": None}), "row 2", "no id", "name", id="name")


class TestDuplicates:
    def test_they_are_counted_with_their_contradictions(self, lines: Any, out: Path) -> None:
        file = lines(*plain(3), *plain(2), {"question": "0+1=", "answer": "one"})
        report = convert(file, out)
        assert (report.train, report.duplicates, report.contradictions) == (6, 3, 1)
        report = convert(file, out, Options(drop_duplicates=True))
        assert (report.read, report.train, report.duplicates, report.contradictions) == (6, 3, 3, 1)
        assert truths(out) == ["1", "2", "3"]


class TestHeldOut:
    def test_every_row_is_on_one_side_and_stays_there(self, lines: Any, out: Path, tmp_path: Path) -> None:
        val = tmp_path / "val.parquet"
        options = Options(val_to=val, val_fraction=0.25)
        report = convert(lines(*plain(400)), out, options)
        train_ids, val_ids = ids(out), ids(val)
        assert train_ids.keys() | val_ids.keys() == {row["question"] for row in plain(400)}
        assert (report.train, report.val) == (len(train_ids), len(val_ids))
        assert 70 <= report.val <= 130
        convert(lines(*reversed(plain(500)), *plain(500)), out, options)
        assert ids(out).keys() >= train_ids.keys()
        assert ids(val).keys() >= val_ids.keys()
        assert not ids(out).keys() & ids(val).keys()
        assert [row["extra_info"]["index"] for row in written(val)] == list(range(len(written(val))))

    def test_a_side_without_rows_is_refused(self, lines: Any, refuses: Any, tmp_path: Path) -> None:
        refuses(lines(*plain(3)), "0 of 3 rows", val_to=tmp_path / "val.parquet", val_fraction=1e-9)
        refuses(lines(*plain(3)), "--val-fraction is 1.5", val_to=tmp_path / "val.parquet", val_fraction=1.5)


class TestPrompts:
    def test_system_and_suffix(self, lines: Any, out: Path) -> None:
        options = Options(system="Be brief.", suffix=r"Answer in \boxed{}.")
        convert(lines(*plain(1)), out, options)
        asked = "0+1=\n" + r"Answer in \boxed{}."
        assert written(out)[0]["prompt"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": asked},
        ]

    def test_a_conversation_keeps_its_messages(self, lines: Any, refuses: Any, out: Path) -> None:
        turns = [
            ("system", "Be kind."),
            ("user", "Hello"),
            ("assistant", "Hello."),
            ("user", "1+1?"),
            ("assistant", "It is"),
        ]
        messages = [{"role": role, "content": content} for role, content in turns]
        file = lines({"prompt": messages, "reward_model": {"ground_truth": "2"}})
        convert(file, out, Options(suffix="Now!"))
        contents = [message["content"] for message in written(out)[0]["prompt"]]
        assert contents == ["Be kind.", "Hello", "Hello.", "1+1?\nNow!", "It is"]
        refuses(file, "--system", "row 1", system="Be brief.")

    def test_what_is_not_a_conversation_is_unusable(self, lines: Any, refuses: Any) -> None:
        bad = [{"role": "user"}], [{"role": "assistant", "content": "Hi"}], ["Hello"], []
        rows = [{"prompt": prompt, "reward_model": {"ground_truth": "2"}} for prompt in bad]
        refuses(lines(*rows), "no row", "row 4 (column prompt is not a list of messages")


class TestKept:
    def test_columns_are_kept_with_their_type(self, out: Path) -> None:
        convert(SAMPLES / "math.jsonl", out, Options(keep=("level", "type")))
        assert [row["extra_info"]["level"] for row in written(out)] == ["Level 1", "Level 3", "Level 2", "Level 2"]
        assert written(out)[1]["extra_info"]["type"] == "Geometry"

    def test_numbers_stay_numbers_and_mixtures_are_refused(self, lines: Any, refuses: Any, out: Path) -> None:
        a, b = plain(2)
        convert(lines({**a, "rate": 0.5}, {**b, "rate": None}), out, Options(keep=("rate",)))
        assert [row["extra_info"]["rate"] for row in written(out)] == [0.5, None]
        refuses(lines({**a, "rate": 0.5}, {**b, "rate": "high"}), "--keep rate", "type", keep=("rate",))
        refuses(lines({**a, "solution": "x"}), "--keep solution", "already", keep=("solution",), shape="plain")

    def test_files_of_several_shapes_share_one_schema(self, lines: Any, tmp_path: Path) -> None:
        for name in ("gsm8k", "math", "dapo"):
            convert(SAMPLES / f"{name}.jsonl", tmp_path / f"{name}.parquet")
        convert(lines(*plain(2)), tmp_path / "plain.parquet")
        schemas = [pyarrow.parquet.read_schema(path) for path in sorted(tmp_path.glob("*.parquet"))]
        assert len(schemas) == 4
        assert all(schema.equals(schemas[0]) for schema in schemas)


class TestFiles:
    """What can be read, and what is said of what cannot."""

    @pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.parquet", "in.jsonl.gz", "in.json.gz"])
    def test_formats(self, name: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows_module, "CHUNK", 3)
        rows, file = plain(8), tmp_path / name
        text = json.dumps(rows) if ".json" in name and "l" not in name[-7:] else "\n".join(map(json.dumps, rows))
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
        elif name.endswith("gz"):
            file.write_bytes(gzip.compress(text.encode()))
        else:
            file.write_bytes(b"\xef\xbb\xbf" + text.encode() if name == "in.jsonl" else text.encode())
        report = convert(file, out)
        assert truths(out) == [row["answer"] for row in rows]
        assert [row["extra_info"]["index"] for row in written(out)] == list(range(8))
        assert report.read == 8

    def test_a_broken_line_is_named(self, lines: Any, refuses: Any) -> None:
        refuses(lines(plain(1)[0], '{"question": "b?"'), "in.jsonl, line 2", "not a JSON object")
        refuses(lines(plain(1)[0], "", "[1, 2]"), "in.jsonl, line 3", "list")
        refuses(lines("[" * 100_000), "in.jsonl, line 1")

    def test_bytes_that_are_no_text_are_named(self, tmp_path: Path, refuses: Any) -> None:
        file = tmp_path / "in.jsonl"
        file.write_bytes(json.dumps(plain(1)[0]).encode() + b'\n{"question": "\xff"}\n')
        refuses(file, "in.jsonl, line 2")

    def test_other_files(self, tmp_path: Path, lines: Any, refuses: Any) -> None:
        refuses(tmp_path / "none.jsonl", "none.jsonl", "no such file")
        refuses(tmp_path / "in.csv", "in.csv", ".jsonl, .json, .parquet")
        refuses(lines(name="empty.jsonl"), "no rows")
        refuses(lines(*plain(2), name="in.json"), "in.json", "named .jsonl")
        refuses(lines('{"data": []}', name="in.json"), "in.json", "dict")
        refuses(lines("[{}, 3]", name="in.json"), "in.json, element 2", "int")
        refuses(lines("PAR1", name="in.parquet"), "in.parquet", "parquet")
        refuses(lines("text", name="in.jsonl.gz"), "in.jsonl.gz", "cannot be read")

    def test_a_gzip_file_that_ends_early(self, tmp_path: Path, refuses: Any) -> None:
        file = tmp_path / "in.jsonl.gz"
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, plain(500))).encode())[:-20])
        refuses(file, "in.jsonl.gz cannot be read")

    def test_outputs(self, tmp_path: Path, lines: Any, refuses: Any, out: Path) -> None:
        file = lines(*plain(2))
        refuses(file, "--to", "out.jsonl", ".parquet", to=tmp_path / "out.jsonl")
        refuses(file, "--val-to", "--to as well", val_to=out)
        convert(file, out)
        refuses(out, "--to", "the file that is read")

    def test_what_was_there_stays_until_the_new_file_is_complete(self, lines: Any, out: Path, tmp_path: Path) -> None:
        convert(lines(*plain(2)), out)
        before = out.read_bytes()
        with pytest.raises(DataError):
            convert(lines(*plain(3), {"question": "?"}), out)
        assert out.read_bytes() == before
        convert(lines(*plain(3)), out)
        assert truths(out) == ["1", "2", "3"]
        assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.parquet"}


class TestReport:
    @pytest.mark.parametrize("name", ["out.parquet", "my data, v2/[a]=1 'x'.parquet"])
    def test_the_override_to_paste_is_understood(self, name: str, lines: Any, tmp_path: Path) -> None:
        import shlex

        out = tmp_path / name
        val = out.with_name("val.parquet")
        report = convert(lines(*plain(60)), out, Options(val_to=val))
        overrides = [parse(word) for word in shlex.split(report.overrides())]
        keys = [(override.key_or_group, override.value()) for override in overrides]
        assert keys == [("data.train_files", str(out)), ("data.val_files", str(val))]

    def test_longest(self, lines: Any, out: Path) -> None:
        report: Report = convert(lines({"question": "12345", "answer": "1"}, {"question": "1", "answer": "123"}), out)
        assert (report.longest_prompt, report.longest_answer) == (5, 3)
        assert convert(lines(*plain(1)), out, Options(suffix="!")).longest_prompt == len("0+1=\n!")


class TestReadByMethods:
    """Worked solution and prompt id where a method reads them."""

    def test_batch(self) -> None:
        infos = [{"solution": "Count.", "prompt_id": "a"}, {"solution": None, "prompt_id": "b"}, None]
        fields = {"rm_scores": torch.zeros(3, 1), "response_mask": torch.ones(3, 1)}
        batch = Batch.from_tensors(uid=["4-1-0", "5-1-1", "6-1-2"], extra_info=infos, **fields)
        assert batch.solution == ["Count.", None, None]
        batch = Batch.from_tensors(uid=["4-1-0"] * 2, extra_info=infos[:2], rm_scores=torch.zeros(2, 1))
        assert batch.extra("prompt_id") == ["a", "b"]

    def test_prompt(self) -> None:
        assert Prompt(4, {"extra_info": {"solution": "Count."}}).solution == "Count."
        assert [Prompt(4, row).solution for row in ({}, {"extra_info": None}, {"extra_info": {}})] == [None] * 3


class TestTooFewRows:
    """verl would divide by the number of steps per epoch, which is zero."""

    @pytest.mark.parametrize(
        ("train", "val", "parts"),
        [(15, 4, ("data.train_files", "15 rows", "16")), (16, 0, ("data.val_files", "0 rows")), (16, 1, None)],
    )
    def test_they_are_refused(self, train: int, val: int, parts: Any, sentence: Any) -> None:
        from verl_plugins.bridge.drawing import DrawsPrompts

        class Trainer(DrawsPrompts):
            config = OmegaConf.create({"data": {"train_batch_size": 16, "filter_overlong_prompts": False}})
            train_dataset, val_dataset = range(train), range(val)

        if parts is None:
            Trainer()._refuse_too_few_rows()
            return
        with pytest.raises(DataError) as caught:
            Trainer()._refuse_too_few_rows()
        sentence(caught.value, *parts)

    def test_what_verl_says_of_an_empty_dataset_is_replaced(self, sentence: Any) -> None:
        from verl_plugins.bridge.drawing import DrawsPrompts

        class Verl:
            def _init_dataloader(self) -> None:
                self.train_dataset = ()
                raise ValueError("num_samples should be a positive integer value")

        class Trainer(DrawsPrompts, Verl):
            data = {"train_batch_size": 16, "filter_overlong_prompts": True, "max_prompt_length": 32}
            config = OmegaConf.create({"data": data})

        with pytest.raises(DataError) as caught:
            Trainer()._init_dataloader()
        sentence(caught.value, "data.train_files gives 0 rows", "data.max_prompt_length (32)")


@pytest.mark.parametrize("name", ["bomb.jsonl", "bomb.jsonl.gz", "deep.jsonl", "deep.json"])
def test_files_that_would_take_all_memory_are_refused(tmp_path: Path, sentence, name: str) -> None:
    path = tmp_path / name
    content = b"[" * 200_000 if name.startswith("deep") else b"0" * (40 << 20)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError) as error:
        list(rows_module.read(path))
    sentence(error.value, name)
