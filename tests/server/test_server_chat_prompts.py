"""What fields of chats do to the prompt, beside those of the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from reprise.loading.checkpoint import DEMO_MODEL
from reprise.loading.tokenizer import load_tokenizer
from reprise.server.conversation import conversation
from reprise.server.engine_server import rendered
from reprise.server.fields import ChatRequest, TokenizeRequest
from reprise.server.options import ServerOptions

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One that begins each text with a token, as Llama's does."""
    found = load_tokenizer(Path(DEMO_MODEL))
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return found


@pytest.mark.parametrize("kind", [ChatRequest, TokenizeRequest])
def test_special_tokens_on_top_of_the_template_s(tokenizer: Any, kind: Any) -> None:
    ids = {}
    for value in (None, False, True):
        request = kind.model_validate({"messages": MESSAGES, "add_special_tokens": value})
        chat, _, _ = conversation(request, {"message_names": []}, ServerOptions())
        ids[value] = rendered(tokenizer, chat)["prompt_token_ids"]
    assert ids[None] == ids[False]
    assert ids[True] == [0, *ids[False]]
