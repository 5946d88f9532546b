"""Checks of configuration, data and machine before a run, and suggestions for one."""
