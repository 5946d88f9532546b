"""Trackers and webhooks: processes beside the controller that follow the run folder and never sink a run."""
