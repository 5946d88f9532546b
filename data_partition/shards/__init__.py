"""Read and write tar shards, and check untrusted input."""
