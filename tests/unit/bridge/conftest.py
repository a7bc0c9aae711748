"""Fixtures of a worker that generates."""

from agents import agents, tiny  # noqa: F401
