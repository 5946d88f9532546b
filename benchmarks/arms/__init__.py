"""Models that the benchmarks train, and the measurements on them that are kept."""
