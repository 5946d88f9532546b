"""The places where stages run; what Ray reads from the environment is set here, before any file imports it."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray exposes its Prometheus metrics without a token; port -1 disables them.
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("AUTOSCALER_METRIC_PORT", "-1")
os.environ.setdefault("DASHBOARD_METRIC_PORT", "-1")

# The controller mostly waits, so workers need not yield to it.
os.environ.setdefault("RAY_worker_niceness", "0")
