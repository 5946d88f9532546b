"""Networks that read the class."""
