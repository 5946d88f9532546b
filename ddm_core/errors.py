"""The root of the project's error classes."""


class DDMError(Exception):
    """Root of all errors of this project; catch it to catch them all."""
