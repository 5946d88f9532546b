"""Ray clusters, networks and simulations that benchmarks break."""
