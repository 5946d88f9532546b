"""Divide the samples into clusters: k-means, balanced k-means, and the strategies that need neither."""
