"""The default scorer: verdicts, what is remembered, and answers made to hang it, break it or run code in it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins.composition import manager
from verl_plugins.reward.comparer import REASONS, Comparer
from verl_plugins.reward.math_verify import MathVerify
from verl_plugins.services import Answer

DEADLINE = 0.3
SHARES = {reason.replace(" ", "_") for reason in REASONS if reason not in ("error", "time-out")}
HANG = r"$\prod_{k=1}^{10000000000} (1+\frac{1}{k})$"


def answer(text, truth):
    return Answer(text=text, ground_truth=truth, data_source="test")


@pytest.fixture(scope="module")
def scorer():
    """The plugin with four workers and a short deadline, ready."""
    plugin = MathVerify(MathVerify.Config(workers=4, deadline=DEADLINE))
    plugin.start_scoring()
    plugin.score_answer(answer("0.5", "1/2"))
    yield plugin
    plugin.comparer.pool.close()


class TestVerdicts:
    @pytest.mark.parametrize(
        ("text", "truth", "form", "reason"),
        [
            ("12", 12, "12", "equal text"),
            ("so it is 12.", "12", "12", "equal text"),
            ("0.5", "1/2", "0.5", "equal value"),
            (r"\boxed{\dfrac12}", "0.5", r"\frac{1}{2}", "equal value"),
            (r"Thus $2\sqrt{3}$", r"\sqrt{12}", r"2\sqrt{3}", "equal value"),
            (r"\boxed{x + 1}", "x+1", "x+1", "equal text"),
            (r"$\{2, 1\}$", r"\{1,2\}", r"\{2, 1\}", "equal value"),
            ("3√2", r"3\sqrt{2}", r"3\sqrt{2}", "equal text"),
            ("25%", r"25\%", r"25\%", "equal text"),
        ],
    )
    def test_right(self, scorer, text, truth, form, reason):
        verdict = scorer.score_answer(answer(text, truth))
        assert (verdict.score, verdict.correct) == (1.0, True)
        assert (verdict.parts["answer"], verdict.parts["reason"]) == (form, reason)

    @pytest.mark.parametrize(
        ("text", "truth", "form", "reason"),
        [
            ("13", "12", "13", "not equal"),
            (r"\boxed{3x}", "2x", "3x", "not equal"),
            ("I have no idea at all.", "12", "", "no final answer"),
            ("", "12", "", "no final answer"),
            (r"\boxed{}", "12", "", "no final answer"),
            (r"\boxed{12 ∇ 1}", "12", "12 ∇ 1", "not understood"),
            (r"\boxed{5}", None, "5", "no ground truth"),
            ("", None, "", "no ground truth"),
            (HANG, "12", r"\prod_{k=1}^{10000000000}(1+\frac{1}{k})", "time-out"),
        ],
    )
    def test_wrong(self, scorer, text, truth, form, reason):
        verdict = scorer.score_answer(answer(text, truth))
        assert (verdict.score, verdict.correct) == (0.0, False)
        assert (verdict.parts["answer"], verdict.parts["reason"]) == (form, reason)

    @pytest.mark.parametrize("text", ["12", "13", "", r"\boxed{12 ∇ 1}", HANG])
    def test_the_reasons_are_numbers_that_add_up_to_one(self, scorer, text):
        parts = scorer.score_answer(answer(text, "12.0")).parts
        assert set(parts) == {"answer", "reason", "verifier_error", "verifier_timeout", *SHARES}
        assert sum(value for value in parts.values() if isinstance(value, float)) == 1

    def test_a_passed_deadline_is_counted_and_in_the_log(self, scorer, caplog):
        assert scorer.score_answer(answer(HANG, "13")).parts["verifier_timeout"] == 1
        assert "timeout (no reply within 0.3 s)" in caplog.text and "prod" in caplog.text

    def test_an_exception_is_counted_and_in_the_log(self, caplog, monkeypatch):
        plugin = MathVerify(MathVerify.Config())
        monkeypatch.setattr(plugin.comparer.pool, "ask", lambda request: {"reason": "error", "what": "ValueError: no"})
        verdict = plugin.score_answer(answer("0.5", "x"))
        assert (verdict.correct, verdict.parts["verifier_error"]) == (False, 1)
        assert "error (ValueError: no)" in caplog.text and "'0.5'" in caplog.text

    def test_marks_are_looked_for_at_the_end_and_boxes_everywhere(self, scorer):
        text = "at first $5$, " + "and then " * 300 + "$7$"
        assert scorer.score_answer(answer(text, "7.0")).correct
        assert not scorer.score_answer(answer("**7.0** " + " and so on" * 300, "7")).correct
        assert scorer.score_answer(answer(r"\boxed{7.0}" + " and so on" * 300, "7")).correct

    @settings(deadline=None, max_examples=20)
    @given(st.integers(), st.integers())
    def test_whole_numbers_need_no_parser(self, one, other):
        plugin = MathVerify(MathVerify.Config())  # would start processes if it used any
        known = psutil.Process().children()
        verdict = plugin.score_answer(answer(str(one), str(other)))
        assert psutil.Process().children() == known
        assert (verdict.correct, verdict.parts["answer"]) == (one == other, str(one))


class TestMemory:
    @pytest.fixture
    def asked(self, monkeypatch):
        """A comparer, and the requests that reached its pool."""
        comparer, asked = Comparer(cache_size=2), []

        def ask(request):
            asked.append(request["answer"])
            time.sleep(0.05)
            return {"reason": "not equal"}

        monkeypatch.setattr(comparer.pool, "ask", ask)
        return comparer, asked

    def test_a_pair_is_compared_once(self, asked):
        comparer, requests = asked
        assert comparer.compare("a", "1") == comparer.compare(" a ", "1")
        comparer.compare("a", "2")
        assert requests == ["a", "a"]

    def test_threads_with_the_same_pair_wait_for_the_first(self, asked):
        comparer, requests = asked
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: comparer.compare("a", "1"), range(8)))
        assert requests == ["a"]

    def test_the_oldest_pair_is_forgotten(self, asked):
        comparer, requests = asked
        for text in ("a", "b", "c", "a"):
            comparer.compare(text, "1")
        assert requests == ["a", "b", "c", "a"]

    def test_memory_can_be_switched_off(self, monkeypatch):
        comparer, requests = Comparer(cache_size=0), []
        monkeypatch.setattr(comparer.pool, "ask", lambda request: requests.append(1) or {"reason": "equal value"})
        assert comparer.compare("a", "1").correct and comparer.compare("a", "1").correct
        assert len(requests) == 2

    def test_an_answer_that_hung_hangs_once(self, scorer):
        scorer.score_answer(answer(HANG, "14"))
        start = time.monotonic()
        assert scorer.score_answer(answer(HANG, "14")).parts["verifier_timeout"] == 1
        assert time.monotonic() - start < 0.1


class TestProcesses:
    def test_building_the_plugin_starts_none(self):
        known = psutil.Process().children()
        plugins = manager.build({"math_verify": {"workers": 3}})
        assert [plugin.config.workers for plugin in plugins] == [3]
        assert psutil.Process().children() == known

    def test_two_instances_share_nothing(self):
        known = psutil.Process().children()
        one, two = (MathVerify(MathVerify.Config(workers=1)) for _ in range(2))
        for plugin in (one, two):
            assert plugin.score_answer(answer("0.50", "1/2")).correct
        assert len(psutil.Process().children()) == len(known) + 2
        one.comparer.pool.close()
        assert two.score_answer(answer("0.500", "1/2")).correct
        two.comparer.pool.close()
        assert psutil.Process().children() == known


def towers():
    """Numbers that cannot be written down, and computations that do not end."""
    forms = [
        "${n}^{{{n}^{{{n}^{{{n}}}}}}}$",
        "{n}**{n}**{n}**{n}",
        r"\boxed{{{n}^{{{n}^{{{n}^{{{n}}}}}}}}}",
        "${n}000000!$",
        "$({n}0000!)!$",
        r"$\binom{{{n}0000000}}{{{n}000000}}$",
        r"$\sum_{{k=1}}^{{{n}0000000000}} \sin(k)$",
        r"$\sum_{{k=1}}^{{\infty}} \frac{{\sin(k^{{{n}}})}}{{k^{{{n}}}+\cos k}}$",
        r"$\prod_{{k=1}}^{{{n}0000000000}} (1+\frac{{1}}{{k}})$",
        r"$\int_0^1 x^{{{n}^{{{n}^{{{n}}}}}}} e^{{x^{{{n}}}}} dx$",
        r"$\gcd({n}00000!,{n}^{{{n}99}})$",
        "$(x+y+z+w)^{{{n}99}}$",
        r"$\begin{{pmatrix}}{n}&1\\1&1\end{{pmatrix}}^{{{n}99999}}$",
        r"$\operatorname{{zeros}}({n}0000,{n}0000)$",
        r"$\{{{n}^{{{n}^{{{n}^{{{n}}}}}}}, 2\}}$",
        "$x < {n}^{{{n}^{{{n}}}}}$",
    ]
    return [form.format(n=n) for form in forms for n in (9, 99, 123456)]


def long_ones():
    """Deep, long and malformed ones."""
    bodies = [
        "(" * 1000 + "1" + ")" * 1000,
        "{" * 900 + "1" + "}" * 900,
        "(" * 1900,
        r"\frac{1}{" * 150 + "2" + "}" * 150,
        r"\sqrt{" * 300 + "2" + "}" * 300,
        "x" + "_{x" * 400 + "}" * 400,
        "^".join("9" * 500),
        "+".join("123456789" * 30),
        "5" + "!" * 900,
        "-" * 1900 + "1",
        "|" * 900 + "x" + "|" * 900,
        "1/" * 900 + "1",
        "1," * 900,
        r"\boxed{" * 280,
    ]
    texts = ["1" * 1_000_000, "$" + "1" * 1_000_000 + "$", "$" * 1999, "$a " * 600, "\0" * 1000, "\ud800" * 100]
    return [*texts, "answer " * 280, " and $1$" * 240, *bodies, *(f"${body}$" for body in bodies)]


def code(file):
    """Attempts to run code, in each of the forms the parsers read."""
    calls = [
        f"__import__('os').system('touch {file}')",
        f"open('{file}','w')",
        f"exec(\"open('{file}','w')\")",
        f"eval(\"open('{file}','w')\")",
        f"(lambda: open('{file}','w'))()",
        f"[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='Popen'][0](['touch','{file}'])",
        f"print.__self__.open('{file}','w')",
        f"sympify(\"open('{file}','w')\")",
        f"parse_expr(\"open('{file}','w')\")",
        f"lambdify([], \"open('{file}','w')\")()",
        f"Symbol.__init__.__globals__['__builtins__']['open']('{file}','w')",
    ]
    forms = ["{}", "${}$", r"\boxed{{{}}}", r"$\text{{{}}}$", r"$\operatorname{{{}}}$", "2+{}", r"$\gcd({},2)$"]
    forms += ["$f({})$", r"$\mathrm{{{}}}(1)$", "the answer is: {}", r"$\lim_{{x \to {}}} x$"]
    return [form.format(call) for call in calls for form in forms]


class TestHostileAnswers:
    def test_they_cost_the_deadline_at_most_and_execute_nothing(self, scorer, tmp_path):
        texts = towers() + long_ones() + code(tmp_path / "created")
        assert len(texts) >= 200

        def score(text, truth="3"):
            start = time.monotonic()
            verdict = scorer.score_answer(answer(text, truth))
            return verdict, time.monotonic() - start

        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(score, texts))
        assert not any(verdict.correct for verdict, _ in results)
        assert sum(verdict.parts["verifier_timeout"] for verdict, _ in results) > 3
        slow = [text for text, (_, seconds) in zip(texts, results, strict=True) if seconds > DEADLINE + 0.5]
        # A second chance, for other tests may keep the machine busy; the other truth makes it another pair.
        assert [text for text in slow if score(text, "4")[1] > DEADLINE + 0.5] == []
        start = time.monotonic()
        assert scorer.score_answer(answer("3.00", "3")).correct
        assert time.monotonic() - start < 1
        assert list(tmp_path.iterdir()) == []

    def test_good_answers_are_scored_while_others_hang(self, scorer):
        hanging = [threading.Thread(target=scorer.score_answer, args=[answer(HANG, str(n))]) for n in range(20, 23)]
        for thread in hanging:
            thread.start()
        start = time.monotonic()
        assert scorer.score_answer(answer("3.000", "3")).correct
        assert time.monotonic() - start < DEADLINE
        for thread in hanging:
            thread.join()
