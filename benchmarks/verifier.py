"""Scoring ordinary answers with math_verify through its processes, against Math-Verify in this process."""

from __future__ import annotations

import itertools
import logging
import time

from timing import best_times, report

from verl_plugins.reward import verifier
from verl_plugins.reward.math_verify import Comparer

ANSWERS = 50
HANG = "$9^{9^{9^{9}}}$"


def main() -> None:
    logging.disable()  # Math-Verify warns that its time-outs are off
    comparer = Comparer(workers=1, deadline=1.0)
    start = time.perf_counter()
    comparer.compare("0.5", r"\frac{1}{2}")
    print(f"start of the processes, and the first answer: {time.perf_counter() - start:.2f} s")
    compare_with(comparer, "numbers", lambda n: (f"so the answer is {n}.5", str(n % 7)))
    compare_with(comparer, "LaTeX", lambda n: (rf"Thus $x=\boxed{{\frac{{{n}}}{{7}}}}$", rf"\frac{{{n % 7}}}{{5}}"))

    start = time.perf_counter()
    comparer.compare(HANG, "3")
    hung = time.perf_counter()
    comparer.compare("0.25", r"\frac{1}{4}")
    print(f"an answer that hangs: deadline + {(hung - start - 1.0) * 1e3:.1f} ms", end=", ")
    print(f"and the next good one after {(time.perf_counter() - hung) * 1e3:.1f} ms")
    comparer.pool.close()


def compare_with(comparer, name, pair) -> None:
    """New answers in each call, so that no cache knows them; then one answer that is known."""
    numbers = itertools.count(1000)

    def here():
        for n in itertools.islice(numbers, ANSWERS):
            verifier.judge(*pair(n))

    def pool():
        for n in itertools.islice(numbers, ANSWERS):
            comparer.compare(*pair(n))

    def known():
        for _ in range(ANSWERS):
            comparer.compare(*pair(0))

    functions = {"in this process": here, "through the pool": pool, "remembered": known}
    report(f"{ANSWERS} answers, {name}", best_times(functions, rounds=2), "in this process")


main()
