"""What every room stands on: artifacts that are complete or absent, random bits, signals; no torch."""
