"""Linear conditional VAE: what x leaves unexplained, and the strength of each latent in the decoder."""

import torch
from cases import Case

from verl_plugins.labs.beyond_vanilla_vae import optimal_strengths, residual_covariance, spectrum


def replay(case: Case, expected: dict) -> dict:
    dx, dy = len(case.input("cov_x", [])), len(case.input("cov_y"))
    shapes = {"cov_x": (dx, dx), "cov_xy": (dx, dy), "cov_y": (dy, dy)}
    cov_x, cov_xy, cov_y = (case.tensor(name).reshape(shape) for name, shape in shapes.items())
    latents = case.param("latent_dim")
    threshold = case.param("beta", 1.0) * case.param("decoder_variance", 1.0)
    values = spectrum(residual_covariance(cov_x, cov_xy, cov_y))
    strengths = optimal_strengths(values, latents, threshold)
    listed = len(expected.get("decoder_sv_squared", strengths))
    padded = torch.cat([values, values.new_zeros(max(latents - len(values), 0))])
    return {
        "residual_eigenvalues": padded[: len(expected.get("residual_eigenvalues", values))].tolist(),
        "decoder_sv_squared": strengths[:listed].tolist(),
        "active": (strengths > 0)[: len(expected.get("active", strengths))].tolist(),
        "n_collapsed": int((strengths[:listed] == 0).sum()),
    }
