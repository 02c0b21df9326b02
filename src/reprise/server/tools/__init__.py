"""Tool calls: read from outputs, and asked for by grammars."""

from reprise.server.tools.choice import ToolUse, parser_name, tool_use
from reprise.server.tools.formats import PARSERS
from reprise.server.tools.parser import Event, ToolParser

__all__ = ["PARSERS", "Event", "ToolParser", "ToolUse", "parser_name", "tool_use"]
