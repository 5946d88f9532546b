"""Attention that reads fewer tokens."""
