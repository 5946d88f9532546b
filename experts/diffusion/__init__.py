"""Noise schedules, prediction types and few-step schedules."""
