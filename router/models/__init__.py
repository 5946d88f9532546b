"""The kinds of router."""
