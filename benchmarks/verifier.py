"""Verdicts of several scorers on answers a person has judged, and what an answer and a hang cost.

python benchmarks/verifier.py [FILE]    # FILE has the columns text, truth and right, as tests/data/answers.jsonl
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from timing import best_times, report

from verl_plugins.reward.compare import judge
from verl_plugins.reward.comparer import Comparer
from verl_plugins.reward.plain import judge_plainly

SUITE = Path(__file__).parents[1] / "tests" / "data" / "answers.jsonl"
ANSWERS = 50
HANG = r"\boxed{\prod_{k=1}^{10000000000} (1+\frac{1}{k})}"
DEADLINE = 5

Scorer = Callable[[str, object], bool]


def main() -> None:
    logging.disable()  # Math-Verify warns that its time-outs are off
    verdicts(Path(sys.argv[1]) if len(sys.argv) > 1 else SUITE)
    costs()


def verdicts(file: Path) -> None:
    """One line per scorer: accuracy, wrong ones rewarded, right ones lost, milliseconds of CPU per answer."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = sum(row["right"] for row in rows)
    print(f"{len(rows)} answers, {right} right and {len(rows) - right} wrong")
    print(f"| {'scorer':44s} | accuracy | wrong rewarded | right lost | ms |\n|---|---|---|---|---|")
    for name, scorer in scorers().items():
        start = time.process_time()
        said = [_limited(scorer, row["text"], row["truth"]) for row in rows]
        spent = (time.process_time() - start) / len(rows) * 1e3  # of this process
        rewarded = sum(one and not row["right"] for one, row in zip(said, rows, strict=True))
        lost = sum(row["right"] and not one for one, row in zip(said, rows, strict=True))
        shares = (1 - (rewarded + lost) / len(rows), rewarded / (len(rows) - right), lost / right)
        print(f"| {name:44s} | " + " | ".join(f"{share:.1%}" for share in shares) + f" | {spent:.1f} |")


def scorers() -> dict[str, Scorer]:
    """Scorers by name; of other packages those that are installed."""
    comparer = Comparer(cache_size=0)
    comparer.pool.ask = lambda request: judge(**request)  # in this process: the same code without the pool
    found: dict[str, Scorer] = {"verl_plugins math_verify": lambda text, truth: comparer.verify(text, truth).correct}
    found["Math-Verify"] = lambda text, truth: judge_plainly(text, str(truth))["correct"]
    for name in ("math_verify", "prime_math", "math_dapo"):
        compute = importlib.import_module(f"verl.utils.reward_score.{name}").compute_score
        found[f"verl {name}"] = lambda text, truth, compute=compute: _is_right(compute(text, str(truth)))
    try:
        grading = importlib.import_module("tinker_cookbook.recipes.math_rl.math_grading")
    except ImportError:
        return found
    found["tinker-cookbook"] = lambda text, truth: grading.grade_answer(grading.extract_boxed(text), str(truth))
    return found


def _is_right(score: object) -> bool:
    """verl's scorers give a number, a tuple that begins with the verdict, or a dict with `acc`."""
    if isinstance(score, dict):
        return bool(score["acc"])
    return bool(score[0]) if isinstance(score, tuple) else float(score) > 0.5


def _limited(scorer: Scorer, text: str, truth: object) -> bool:
    """What the scorer says; an exception and a passed deadline are a no."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(DEADLINE)
    try:
        return bool(scorer(text, truth))
    except Exception:
        return False
    finally:
        signal.alarm(0)


def costs() -> None:
    """Times of new and known answers through the pool, against the same code in this process, and of a hang."""
    comparer = Comparer(workers=1, deadline=1.0)
    start = time.perf_counter()
    comparer.verify("0.5", r"\frac{1}{2}")
    print(f"start of the processes, and the first answer: {time.perf_counter() - start:.2f} s")
    compare_with(comparer, "numbers", lambda n: (f"so the answer is {n}.5", str(n % 7)))
    compare_with(comparer, "LaTeX", lambda n: (rf"Thus $x=\boxed{{\frac{{{n}}}{{7}}}}$", rf"\frac{{{n % 7}}}{{5}}"))

    start = time.perf_counter()
    comparer.verify(HANG, "3")
    hung = time.perf_counter()
    comparer.verify("0.25", r"\frac{1}{4}")
    print(f"an answer that hangs: deadline + {(hung - start - 1.0) * 1e3:.1f} ms", end=", ")
    print(f"and the next good one after {(time.perf_counter() - hung) * 1e3:.1f} ms")
    comparer.pool.close()


def compare_with(comparer: Comparer, name: str, pair: Callable[[int], tuple[str, str]]) -> None:
    """New answers in each call, so that no cache knows them; then one answer that is known."""
    numbers = itertools.count(1000)
    local = Comparer(cache_size=0)
    local.pool.ask = lambda request: judge(**request)

    def plain():
        for n in itertools.islice(numbers, ANSWERS):
            judge_plainly(*pair(n))

    def here():
        for n in itertools.islice(numbers, ANSWERS):
            local.verify(*pair(n))

    def pool():
        for n in itertools.islice(numbers, ANSWERS):
            comparer.verify(*pair(n))

    def known():
        for _ in range(ANSWERS):
            comparer.verify(*pair(0))

    functions = {"Math-Verify": plain, "in this process": here, "through the pool": pool, "remembered": known}
    report(f"{ANSWERS} answers, {name}", best_times(functions, rounds=2), "Math-Verify")


if __name__ == "__main__":  # verl's scorer starts processes that import this file
    main()
