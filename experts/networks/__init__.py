"""Build, load and save the diffusers models that experts train."""
