"""Encode images as latents, and decode latents to images."""
