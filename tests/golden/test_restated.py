"""A recorded case that is written in another way says the same: the replays take it.

Masks as true and false or as 1.0 and 0.0, whole scores without a point, other ids, wider rows, a padding row in front,
rows in another order, and settings that are left out where they have their default.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl_plugins.testing import differences, read_cases

FILES = sorted((Path(__file__).parent / "data").glob("*.json"))
CASES = [(method, case) for method, cases in map(read_cases, FILES) for case in cases]
CASES = [(method, case) for method, case in CASES if "uid" in case["inputs"]]
BY_ROW_ORDER = {"keep_mask", "loss", "uid_order", "bundle_ids", "bundle_index", "entry_ids"}
"""What depends on which row comes first."""
PADDING = {"uid": "pad-new", "bundle_uid": "pad-new", "extract_answer": "", "keep_mask": 1, "bundle_index": -1}
DEFAULTS = {"norm_adv_by_std_in_grpo": True, "k": 5, "b": 1, "alpha_scope": "group", "std_ddof": 1}
"""Of settings that every sheet gives the same default."""


def of_rows(case: dict[str, Any], part: str) -> list[str]:
    """What has one entry for each row."""
    rows = len(case["inputs"]["uid"])
    return [name for name, value in case[part].items() if isinstance(value, list) and len(value) == rows]


def other_masks(kind: type) -> Callable[[dict[str, Any]], bool]:
    def restate(case: dict[str, Any]) -> bool:
        for name in {"response_mask", "prompt_mask"} & case["inputs"].keys():
            case["inputs"][name] = [[kind(one) for one in row] for row in case["inputs"][name]]
        return "response_mask" in case["inputs"]

    return restate


def whole_scores(case: dict[str, Any]) -> bool:
    for name in {"token_level_rewards", "token_level_scores"} & case["inputs"].keys():
        rows = case["inputs"][name]
        case["inputs"][name] = [[int(value) if value == int(value) else value for value in row] for row in rows]
    return "token_level_rewards" in case["inputs"] or "token_level_scores" in case["inputs"]


def numbered(case: dict[str, Any]) -> bool:
    uid = case["inputs"]["uid"]
    names = list(dict.fromkeys(uid))
    named = {"uid_order", "pivots_dropped_per_uid", "bits"} & case["expected"].keys() or "replay_uid" in case["inputs"]
    if named or any(str(name).startswith("pad") for name in names):
        return False
    case["inputs"]["uid"] = [900 - names.index(name) for name in uid]
    return True


def wider(case: dict[str, Any]) -> bool:
    width = max(map(len, case["inputs"].get("response_mask", [[]])))
    for part in ("inputs", "expected"):
        for name in of_rows(case, part):
            if all(isinstance(row, list) and len(row) == width for row in case[part][name]):
                case[part][name] = [[*row, type(row[0])(), type(row[0])()] for row in case[part][name]]
    whole = not any(isinstance(value, dict) for value in case["inputs"].values()) and "buffer" not in case["inputs"]
    return bool(width) and whole and not {"horizon", "replay_uid"} & {*case["params"], *case["inputs"]}


def padded(case: dict[str, Any]) -> bool:
    names = {part: of_rows(case, part) for part in ("inputs", "expected")}
    for part in names:
        for name in names[part]:
            first = case[part][name][0]
            usual = 1.0 if name == "weight" and "variant" in case["params"] else 0
            new = [0] * len(first) if isinstance(first, list) else PADDING.get(name, usual)
            case[part][name] = [new, *case[part][name]]
    nested = any(isinstance(value, dict) for value in case["inputs"].values())
    return not nested and not {"p", "replay_uid", "rank_mask", "replay_score"} & {*case["expected"], *case["inputs"]}


def reversed_rows(case: dict[str, Any]) -> bool:
    for part in ("inputs", "expected"):
        for name in of_rows(case, part):
            case[part][name] = case[part][name][::-1]
    nested = any(isinstance(value, dict) for value in case["inputs"].values())
    return not nested and not BY_ROW_ORDER & case["expected"].keys() and "replay_uid" not in case["inputs"]


def without_defaults(case: dict[str, Any]) -> bool:
    left_out = [name for name, value in case["params"].items() if name in DEFAULTS and DEFAULTS[name] == value]
    case["params"] = {name: value for name, value in case["params"].items() if name not in left_out}
    return bool(left_out)


RESTATED = {
    "masks of true and false": other_masks(bool),
    "masks of 1.0 and 0.0": other_masks(float),
    "whole scores": whole_scores,
    "numbered": numbered,
    "wider": wider,
    "padded": padded,
    "reversed": reversed_rows,
    "without defaults": without_defaults,
}


def restated() -> list[Any]:
    """Every case in every way in which it can be written."""
    found = []
    for method, case in CASES:
        for how, restate in RESTATED.items():
            other = copy.deepcopy(case)
            if restate(other):
                found.append(pytest.param(method, other, id=f"{method}-{case['name']}-{how}"))
    return found


@pytest.mark.parametrize(("method", "case"), restated())
def test_restated(method, case):
    assert differences(case, importlib.import_module(f"replay_{method}").replay) == []


@pytest.mark.parametrize(("method", "case"), CASES, ids=[f"{method}-{case['name']}" for method, case in CASES])
def test_what_nobody_knows_is_a_failure(method, case):
    case = copy.deepcopy(case)
    case["inputs"]["of_tomorrow"], case["params"]["of_tomorrow"], case["expected"]["of_tomorrow"] = [1], 2, 3
    found = differences(case, importlib.import_module(f"replay_{method}").replay)
    assert len([text for text in found if "of_tomorrow" in text]) == 3
