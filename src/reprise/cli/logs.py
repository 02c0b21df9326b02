"""Log lines go to standard error, through rich; other libraries keep quiet."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LIBRARY_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def configure(level: LogLevel) -> None:
    """Call before torch and transformers are imported; what the user has set stays."""
    from rich.console import Console
    from rich.logging import RichHandler

    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = RichHandler(
        console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", markup=False
    )
    logger = logging.getLogger("reprise")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    # Warnings of other libraries are for those who ask for details.
    logging.captureWarnings(True)
    warnings = logging.getLogger("py.warnings")
    warnings.handlers = [handler]
    warnings.setLevel("WARNING" if level in (LogLevel.DEBUG, LogLevel.INFO) else "CRITICAL")


def console() -> Console:
    """That of the log lines, which appear above what moves on it. After :func:`configure`."""
    from rich.logging import RichHandler

    handlers = logging.getLogger("reprise").handlers
    return next(each.console for each in handlers if isinstance(each, RichHandler))
