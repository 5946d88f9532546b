"""Pools: configuration, rendered files against the schemas of whoever reads them, real scaling on this machine."""
