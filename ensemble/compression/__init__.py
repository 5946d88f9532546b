"""From an ensemble to a smaller or faster one: each stage reads a pipeline's folder and writes another.

    pipeline ──► quantize ──► pipeline + compression.json

`compression.json` says what it cost. The folder that is read is never touched, a stage that found nothing to do is an
error, and without a setting there is no stage. What a stage did to the samples is measured twice: by the relative L2
distance to those of the whole ensemble from the same noise (`comparison.py`), and by a score like any other row of the
table.
"""
