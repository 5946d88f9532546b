"""The typed configuration, and how Hydra composes it."""
