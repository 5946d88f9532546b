"""Islands: storage, client, placement, and real Ray clusters on loopback."""
