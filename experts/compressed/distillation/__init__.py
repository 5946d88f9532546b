"""Layers that distillation adds to published networks."""
