"""Pools: configuration, rendered files against their tools' schemas, real scaling on this machine."""
