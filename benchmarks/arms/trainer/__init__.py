"""The parts of `benchmarks.training`: each returns its claims and its tables."""
