"""Layers and weights in few bits."""
