"""Ray's own provider of nodes on one machine, with a separate code folder for each node.

With a shared folder, nodes would install the same wheel into it at the same time. The autoscaler imports a copy of
this file alone, so it must not import anything but Ray.
"""

from collections.abc import Mapping
from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Starts and ends raylets on loopback for Ray's autoscaler."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: Mapping[str, Any],
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        with self.lock:
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{self._next_node_id}"
            super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
