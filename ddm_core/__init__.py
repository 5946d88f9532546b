"""Shared foundations of all packages: artifacts that are complete or absent, errors, random streams; no torch."""
