"""What an actor of Ray is on its host: an object of this package, made in the right environment.

Ray imports this module to make an actor, so it imports nothing that reads variables.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any


class Actor:
    """Holds one object.

    Args:
        environment: Variables for this process, where its host has none.
        made: ``module:class`` of the object.
        *arguments: Of the class.
    """

    def __init__(self, environment: Mapping[str, str], made: str, *arguments: Any) -> None:
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        module, _, name = made.partition(":")
        self._made = getattr(importlib.import_module(module), name)(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object."""
        return getattr(self._made, method)(*arguments)
