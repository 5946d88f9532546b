"""Tables of results for a terminal, and the ranking that decides what they may call better."""
