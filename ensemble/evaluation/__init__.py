"""Generate samples and score them against held-out images."""
