"""Commands for the machines of a run: islands and pools."""
