"""Networks of the router: mlp, transformer, prior_table, nearest_centroid, density_ratio."""
