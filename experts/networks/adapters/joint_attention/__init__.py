"""Networks in which latents and text attend to each other."""
