"""Feature extractors: images to the vectors that are clustered."""
