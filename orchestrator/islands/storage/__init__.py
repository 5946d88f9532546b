"""Content-addressed folders in object storage."""
