"""Compression and acceleration of an ensemble: each stage reads a pipeline's folder and writes another.

    pipeline ──► quantize ──► pipeline + compression.json

Stages are optional; a run has none unless it is configured. A stage never changes the folder that it reads, and a stage
that changes nothing fails. `compression.json` reports the cost and the relative L2 distance between compressed and
original samples of the same noise (`measurement.py`). Scores for the compressed ensemble are computed like all others.
"""
