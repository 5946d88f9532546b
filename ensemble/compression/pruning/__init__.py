"""Remove layers (LAPTOP-Diff) or units (EcoDiff)."""
