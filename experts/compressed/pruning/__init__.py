"""Remove layers and units from a network."""
