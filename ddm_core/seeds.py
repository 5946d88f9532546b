"""The seeds that a configuration may have; imports no numpy."""

from typing import Annotated

from pydantic import Field

MAX_SEED = 2**62
"""Largest seed that a user may set: generators take 64 bits, and a training that is repeated adds to it."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
