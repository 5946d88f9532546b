"""Models that the experts are compared with."""
