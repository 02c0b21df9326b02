"""Texts that have to match a schema, an expression or a grammar.

xgrammar is imported when the first request asks for it, and nowhere else.
"""

from reprise.engine.structured.compiler import GrammarCompiler
from reprise.engine.structured.grammar import Grammar
from reprise.engine.structured.requests import Grammars
from reprise.engine.structured.vocabulary import installed

__all__ = ["Grammar", "GrammarCompiler", "Grammars", "installed"]
