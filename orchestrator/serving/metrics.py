"""Counters and times of the service, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class ServiceMetrics:
    """What one service has done; labels have names of models and statuses, never prompts."""

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        self.requests = Counter("ddm_requests", "Answered requests", ["model", "status"], registry=self.registry)
        self.images = Counter("ddm_images", "Images that were sent", ["model"], registry=self.registry)
        self.seconds = Histogram(
            "ddm_request_seconds", "Time of a request", ["model"], buckets=SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("ddm_images_in_flight", "Images that wait or are sampled", registry=self.registry)

    def to_text(self) -> bytes:
        """Return the state in the text format."""
        return generate_latest(self.registry)
