"""Divide the samples into clusters: k-means, balanced k-means, and strategies by class or at random."""
