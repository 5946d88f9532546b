"""One script per claim. Each measures both sides alternately on one machine and writes `docs/benchmarks/<script>.json`.

`python -m benchmarks.page` generates `docs/benchmarks.md` from those files; no part of that page is written by hand.
"""
