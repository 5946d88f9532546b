"""Decoded images of this process, kept for its next pass over a data set: a fit, the features, a score.

Where all images fit, each is decoded once a process. Those of a larger data set leave before they are read again.
"""

from collections import OrderedDict
from threading import Lock

from data_partition.shards.images import Decoded, decode_with_remarks

MAX_KEPT_BYTES = 2**26
"""Bytes of files and pixels that are kept in memory."""


class DecodedImages:
    """The images that were decoded last, by the bytes of their files; their pixels are read-only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.kept_bytes = 0
        self._images: OrderedDict[bytes, Decoded] = OrderedDict()
        self._lock = Lock()

    def decode(self, data: bytes) -> Decoded:
        """Return what `decode_with_remarks` does; raises `UnreadableImage`."""
        with self._lock:
            if data in self._images:
                self._images.move_to_end(data)
                return self._images[data]
        decoded = decode_with_remarks(data)
        decoded.pixels.flags.writeable = False
        with self._lock:
            if data not in self._images:
                self._images[data] = decoded
                self.kept_bytes += len(data) + decoded.pixels.nbytes
            while self.kept_bytes > self.max_bytes:
                file, left = self._images.popitem(last=False)
                self.kept_bytes -= len(file) + left.pixels.nbytes
        return decoded

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._images.clear()
            self.kept_bytes = 0


IMAGES = DecodedImages(MAX_KEPT_BYTES)
"""Of this process."""
