"""What a chat template must be, wherever it comes from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from reprise.arguments import shown
from reprise.errors import RequestError

if TYPE_CHECKING:
    from jinja2.nodes import Template


def parsed(text: str) -> Template:
    """The tree of a chat template in Jinja, with transformers' extensions.

    Raises:
        RequestError: It is no template, or reads no messages: a file's name, mostly.
    """
    from jinja2 import Environment, TemplateError, meta

    # transformers' own block, which changes nothing that is read.
    plain = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", text)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateError as error:
        raise RequestError(f"the chat template is not valid: {error}") from error
    if "messages" not in meta.find_undeclared_variables(tree):
        raise RequestError(
            f"the chat template {shown(text)} does not read 'messages', so that all conversations "
            "would be the same prompt: give the template's text"
        )
    return tree
