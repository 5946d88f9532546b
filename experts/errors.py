"""Errors that several modules raise; importing them needs no torch."""

from ddm_core.errors import DDMError


class CodecError(DDMError, ValueError):
    """A codec does not fit the images, or its files are not valid."""
