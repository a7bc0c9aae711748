"""Within-class variability by depth, and the central-path flow of the lab."""

import torch
from cases import Case

from verl_plugins.diagnostics.nc_perturbation import depth_nc1
from verl_plugins.labs.nc_perturbation import Flow, central_path


def replay(case: Case, expected: dict) -> dict:
    return {"depthwise_nc1": depthwise, "central_path_flow": flow}[case.param("mode")](case)


def depthwise(case: Case) -> dict:
    labels = torch.tensor(case.input("labels"), dtype=torch.int64)
    found = depth_nc1(case.tensor("layer_features").transpose(0, 1), labels)
    result = {"nc1_quotient": found.quotient.tolist(), "ratio": found.ratio.tolist()}
    if len(found.ratio):
        result["fraction_decreasing"] = float((found.ratio < 1).double().mean())
    return result


def flow(case: Case) -> dict:
    settings = Flow(case.param("lambda_w"), case.param("lambda_h"), case.param("beta"), case.param("dt"))
    labels = torch.tensor(case.input("labels"), dtype=torch.int64)
    path = central_path(case.tensor("features0"), labels, settings, case.param("steps"))
    quotients = torch.stack([depth_nc1(features.T[:, None], labels).quotient[0] for features in path])
    return {
        "nc1_quotient": quotients.tolist(),
        "features": path[-1].tolist(),
        "final_over_initial": float(quotients[-1] / quotients[0]),
    }
