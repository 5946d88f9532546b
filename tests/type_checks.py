"""Check types and shapes in the first calls of each function in a test: all calls would take a quarter of the suite."""

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping

CHECKED_CALLS = 12
"""Calls of each function in one test whose arguments and result are checked."""

calls: Counter[Callable[..., Any]] = Counter()
"""Calls of each function since the test began."""


def check_first_calls() -> None:
    """Replace the decorator that jaxtyping's import hook puts on every function and class of ours."""
    check_every_call = jaxtyping.jaxtyped

    def check(function: Any, typechecker: Any) -> Any:
        @functools.cache
        def checked() -> Callable[..., Any]:
            return check_every_call(function, typechecker=typechecker)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if calls[function] >= CHECKED_CALLS:
                return function(*args, **kwargs)
            calls[function] += 1
            return checked()(*args, **kwargs)

        return call

    def decorate(decorated: Any, typechecker: Any) -> Any:
        if not inspect.isclass(decorated):
            is_local = "<locals>" in decorated.__qualname__
            return decorated if is_local else check(decorated, typechecker)
        if dataclasses.is_dataclass(decorated) and "__init__" in vars(decorated):
            decorated.__init__ = check(decorated.__init__, typechecker)
        return decorated

    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(decorate, typechecker=typechecker)
