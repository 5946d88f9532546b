"""Cache features along a sampling trajectory."""
