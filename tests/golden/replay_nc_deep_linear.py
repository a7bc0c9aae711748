"""Optimum of the deep linear model with imbalanced classes: responses, lengths, singular values, lost classes."""

from cases import Case

from verl_plugins.diagnostics.nc_deep_linear import Problem, optimum


def replay(case: Case, expected: dict) -> dict:
    decays = case.param("weight_decays")
    problem = Problem(tuple(case.input("class_counts")), tuple(decays), case.param("feature_decay"))
    found = optimum(problem)
    return {
        "fit": found.fit.tolist(),
        "feature_mean_norm": found.feature_norm.tolist(),
        "layer_singular_values": found.singular_values.tolist(),
        "collapsed": (found.fit == 0).tolist(),
        "objective": float(found.objective),
    }
