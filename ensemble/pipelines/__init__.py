"""Ensembles as pipelines of diffusers: components, schedulers, memory, adapters, export."""
