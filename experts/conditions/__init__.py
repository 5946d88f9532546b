"""What a sample is conditioned on: its class and its text."""
