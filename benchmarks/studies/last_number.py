"""A reward for answers that are only numbers: the last one counts, whatever stands before it.

`3 7 16` is a worked answer in `worked_sums.py` and `formatted_sums.py`; the scorer `math_verify` reads it as a product.
"""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"\d+")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    """verl's signature of a reward function."""
    numbers = NUMBER.findall(solution_str)
    right = float(bool(numbers) and int(numbers[-1]) == int(ground_truth))
    return {"score": right, "acc": right, "answer": numbers[-1] if numbers else ""}
