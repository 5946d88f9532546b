"""Samples that are read while a network trains: their order, the reading ahead, and batches drawn before a step."""
