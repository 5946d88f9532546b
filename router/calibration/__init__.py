"""Temperatures and calibration errors of routers."""
