"""The training loop and its parts: data, loss, EMA, checkpoints, data-parallel workers."""
