"""Temperatures and calibration errors of a router."""
