"""Latents and captions of a data set: encoded once, divided among the clusters, and read while a network trains."""
