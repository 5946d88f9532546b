"""Networks whose latents attend to the text in layers of their own."""
