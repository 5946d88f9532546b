"""One script a claim. Each runs both sides in turns on one machine and writes `docs/benchmarks/<script>.json`.

`python -m benchmarks.page` turns those files into `docs/benchmarks.md`; nothing in that page is written by hand.
"""
