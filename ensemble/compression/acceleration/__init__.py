"""Feature caches, diffusers' cache hooks and truncated starts."""
