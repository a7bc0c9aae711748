"""Distillation from a teacher beside the reward."""
