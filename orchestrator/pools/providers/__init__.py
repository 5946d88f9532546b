"""Start and stop rented nodes, one file per provider."""
