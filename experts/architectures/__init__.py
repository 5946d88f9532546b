"""Network architectures that diffusers does not have."""
