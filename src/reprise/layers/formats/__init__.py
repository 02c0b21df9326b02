"""How weights are stored and multiplied: one file a format."""

from reprise.layers.formats.base import Columns, Format, Formats, Rows
from reprise.layers.formats.dense import DENSE, PLAIN, Dense
from reprise.layers.formats.registry import formats_of, reader_of

__all__ = [
    "DENSE",
    "PLAIN",
    "Columns",
    "Dense",
    "Format",
    "Formats",
    "Rows",
    "formats_of",
    "reader_of",
]
