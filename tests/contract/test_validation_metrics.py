"""The bootstrap of validation metrics gives verl's own numbers, bit for bit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo import metric_utils

from verl_plugins.bridge.validation import VERLS, bootstrap_metric, fast_validation_metrics

FEW = settings(max_examples=25, deadline=None)
NUMBERS = st.floats(-3, 3) | st.integers(-2, 2) | st.booleans()


@FEW
@given(st.lists(NUMBERS, min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 3))
def test_best_and_worst(data, size, seed):
    arguments = (data, size, [np.max, np.min], 40, seed)
    assert bootstrap_metric(*arguments) == VERLS(*arguments)


@FEW
@given(st.lists(st.tuples(st.sampled_from(["1", "2", "", None]), NUMBERS), min_size=1, max_size=9), st.integers(1, 9))
def test_majority(answers, size):
    """Also where votes are equal, and where the votes of one kind have different values."""
    data = [{"pred": pred, "val": value} for pred, value in answers]
    arguments = (data, size, [partial(metric_utils.calc_maj_val, vote_key="pred", val_key="val")], 40)
    assert bootstrap_metric(*arguments) == VERLS(*arguments)


@pytest.mark.parametrize("data", [[float("nan"), 1.0, 0.0], ["a", "b", "c"]], ids=["nan", "text"])
def test_other_data_is_left_to_verl(data):
    reduce_fns = [np.max, np.min] if data[1] == 1.0 else [lambda sample: float(len(set(sample)))]
    arguments = (data, 2, reduce_fns, 20)
    np.testing.assert_array_equal(bootstrap_metric(*arguments), VERLS(*arguments))


def test_all_metrics_of_a_validation():
    rng = np.random.default_rng(0)
    uids = [f"{row // 4}" for row in range(32)]
    values = {
        "reward": rng.choice([0.0, 1.0], 32).tolist(),
        "length": rng.integers(1, 9, 32).tolist(),
        "acc": [None if row == 5 else float(row % 3 == 0) for row in range(32)],
        "pred": [str(number) for number in rng.integers(0, 3, 32)],
    }
    before = np.random.get_state()[1].copy()
    with fast_validation_metrics():
        ours = metric_utils.process_validation_metrics(["sums"] * 32, uids, values)
        again = metric_utils.process_validation_metrics(["sums"] * 32, uids, values)
    np.testing.assert_array_equal(before, np.random.get_state()[1])
    assert metric_utils.bootstrap_metric is VERLS
    assert ours == again == metric_utils.process_validation_metrics(["sums"] * 32, uids, values)
    assert {"maj@4/mean", "best@2/std", "worst@4/mean"} <= ours["sums"]["reward"].keys()
