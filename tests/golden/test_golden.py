"""Every recorded case of every method, replayed through the functions and hooks that training calls.

A case file is JSON: id, produced_by, cases with name, inputs, params, expected, rtol, atol. `replay_<id>.py` turns one
case into a dict of what our code computes; every expected key must be in it. A file, input, parameter or expectation
that nothing here knows is a failure. VERL_PLUGINS_GOLDEN names another folder of such files.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import pytest
from cases import NotOffered

from verl_plugins.testing import differences, read_cases

FOLDER = Path(os.environ.get("VERL_PLUGINS_GOLDEN") or Path(__file__).parent / "data")
FILES = sorted(FOLDER.glob("*.json"))
CASES = [(method, case) for method, cases in map(read_cases, FILES) for case in cases]


def test_there_are_cases():
    assert CASES, f"no cases in {FOLDER}"


@pytest.mark.parametrize(("method", "case"), CASES, ids=[f"{method}-{case['name']}" for method, case in CASES])
def test_golden(method, case):
    assert importlib.util.find_spec(f"replay_{method}"), f"no replay_{method}.py: method {method!r} is unknown here"
    try:
        assert differences(case, importlib.import_module(f"replay_{method}").replay) == []
    except NotOffered as refusal:
        pytest.skip(f"{method}: {refusal}")
