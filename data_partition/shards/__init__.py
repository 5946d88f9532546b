"""Read and write tar shards, and check what strangers put into them."""
