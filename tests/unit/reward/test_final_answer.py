"""What the final answer of a response is, and how it is written."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins.reward.final_answer import final_answer, last_boxed, last_boxes, marked_answer
from verl_plugins.reward.normal_form import normal_form


class TestFinalAnswer:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"Two of them: \boxed{1}. In the end it is \fbox{2}, which is **3**.", "2"),
            (r"\boxed{4} is wrong. Hence \boxed{5", None),
            (r"<answer>6</answer> and \boxed{7}", "6"),
            ("<answer>6</answer><answer></answer>", None),
            ("The answer is 8.\n#### 9", "9"),
            ("The answer is 10. **11**", "10"),
            ("`12` and **13**", "13"),
            ("First 14, then `15`, and 16", "15"),
            ("Take 17 and add 1 to get 18 of them all.", "18"),
            ("<think>The answer is 19.</think> The answer is 20.", "20"),
            (r"<think>\boxed{21}", "21"),
            ("<think>The answer is 22.", None),
            ("Is it 23, I wonder, or is it not?", None),
            ("I am torn between 24 and 25.", None),
            (r"\boxed{26} or \boxed{27}", "26, 27"),
            (r"\boxed{28} \boxed{28}", "28"),
            ("It goes on and on.", None),
            ("", None),
        ],
    )
    def test_the_last_mark_of_the_first_kind(self, text, answer):
        assert final_answer(text) == answer

    @pytest.mark.parametrize("box", ["boxed", "fbox", "framebox", "bbox"])
    def test_every_box_command(self, box):
        assert final_answer(rf"3 and \{box}{{\frac{{1}}{{2}}}} or so, 7") == r"\frac{1}{2}"

    def test_a_box_is_found_however_far_from_the_end(self):
        assert final_answer(r"\boxed{5} " + "word " * 10_000) == "5"

    def test_only_marks_are_marked(self):
        assert marked_answer("We get 5.") == (False, None)
        assert marked_answer("The answer is 5.") == (True, "5")
        assert marked_answer(r"\boxed{}") == (True, None)

    @settings(deadline=None, max_examples=300)
    @given(st.text(alphabet="\\boxed{}<answer>#*`$ is:.0123√\n?/", max_size=80))
    def test_any_text_can_be_read(self, text):
        answer = final_answer(text)
        assert answer is None or isinstance(normal_form(answer), str)
        assert (last_boxes(text) is None) == (last_boxed(text) is None and r"\boxed" not in text)


class TestNormalForm:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("½", r"\dfrac12"),
            ("3√2", r"$3 \sqrt 2$"),
            ("−5", "-5"),
            ("x² + 1", "x^{2}+1"),
            ("10⁻³⁴", "10^{-34}"),
            ("2\u202f500", r"2{,}500"),
            ("∞", r"\infty"),
            (r"\left( 1 ,2 \right)", "(1,2)"),
            (r"\text{27}", "27"),
            ("35%", r"35\%"),
            (r"\boxed{45}", "45."),
            ("$$x\\leq 3$$", "x≤3"),
            ("\uff15\uff16", "56"),
        ],
    )
    def test_one_way_to_write_it(self, one, other):
        assert normal_form(one) == normal_form(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [("2 3/8", "23/8"), ("100, 200", "100,200"), ("0.5", "1/2"), ("x^{2}3", "x^{23}"), ("-5", "5"), ("A", "a")],
    )
    def test_what_may_differ_stays_different(self, one, other):
        assert normal_form(one) != normal_form(other)

    @settings(deadline=None, max_examples=200)
    @given(st.text(alphabet=r"\frac{}12x+-√²½ .,$^_", max_size=30))
    def test_is_stable(self, text):
        assert isinstance(normal_form(text), str)


def test_verify_imports_neither_verl_nor_torch_and_ends_with_its_process():
    code = """
        import json, sys
        from verl_plugins.reward import verify, verify_all
        one = verify(r"It is $\\boxed{0.5}$.", r"\\frac12")
        more = verify_all([("#### 4", "4"), ("#### 4", None), ("We go on and on.", "4")], workers=1)
        heavy = sorted({"verl", "torch", "ray", "sympy"} & set(sys.modules))
        print(json.dumps([heavy, one.score, one.reason, one.answer, [v.reason for v in more]]))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    reasons = ["equal text", "no ground truth", "no final answer"]
    assert json.loads(done.stdout) == [[], 1.0, "equal value", "0.5", reasons]
