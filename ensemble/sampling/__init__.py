"""From seeds to latents to images."""
