"""Real weights and a real tokenizer: SmolLM2-135M-Instruct against transformers in float32.

``REPRISE_LONG_TESTS=1`` runs all chats at full length; else a few short ones are run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import TinyModel

from reprise import LLM, SamplingParams

TOOL = Path(__file__).parents[2] / "tools" / "gguf_to_checkpoint.py"
LONG = os.environ.get("REPRISE_LONG_TESTS") == "1"
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 12 + 7?",
    "List three colours of the rainbow.",
    "Explain gravity to a child in two sentences.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What does `for i in range(3): print(i)` print in Python?",
    "Write a short story about a dragon who is afraid of fire.",
    "Name five animals that live in the ocean.",
    "Why is the sky blue?",
    "Summarise: The cat sat on the mat. The dog barked. The cat ran away.",
    "What is the opposite of 'generous'?",
    "Wie heißt die Hauptstadt von Österreich?",
    "Complete the series: 2, 4, 8, 16,",
    "Write a polite email that declines an invitation.",
    "What emoji would you use for happiness? 😀 or 😢?",
    "Tell me a joke.",
    "How many legs do three spiders have in total?",
]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_to_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def smollm2() -> TinyModel:
    """Converted once for each version of the tool, and kept in the user's cache directory."""
    tool = load_tool()
    path = tool.cache_directory() / hashlib.sha256(TOOL.read_bytes()).hexdigest()[:16]
    if not path.is_dir():
        begun = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            tool.convert(begun)
            begun.rename(path)
        except RuntimeError as error:
            pytest.skip(str(error))
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    return TinyModel(path)


def first_difference(
    model: TinyModel, prompt: Sequence[int], output: Sequence[int]
) -> tuple[int, float] | None:
    """Where greedy decoding by transformers leaves ``output``, and its gap of the two best there.

    By induction: each token is the argmax behind the tokens before it.
    """
    logits = model.logits([*prompt, *output])[len(prompt) - 1 : -1]
    wrong = (logits.argmax(dim=-1) != torch.tensor(output)).nonzero()
    if not len(wrong):
        return None
    best = logits[int(wrong[0])].topk(2).values
    return int(wrong[0]), float(best[0] - best[1])


def test_chats_are_those_of_transformers(smollm2: TinyModel, device: str, tolerance: float) -> None:
    from transformers import PreTrainedTokenizerFast

    questions, length = (QUESTIONS, 96) if LONG else (QUESTIONS[:3], 16)
    assert len(QUESTIONS) == 20
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2.path)
    llm = LLM(str(smollm2.path), device=device, dtype="float32", max_model_len=1024)
    chats = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=length), use_tqdm=False)
    assert "Paris" in outputs[0].outputs[0].text
    near_ties = 0
    for chat, output in zip(chats, outputs, strict=True):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert output.prompt_token_ids == tokenizer.encode(prompt)
        completion = output.outputs[0]
        assert len(completion.token_ids) == length or completion.token_ids[-1] == 2
        difference = first_difference(smollm2, output.prompt_token_ids, completion.token_ids)
        if difference is not None:
            near_ties += 1
            assert difference[1] < tolerance, (chat, difference, completion.text)
    # A gap of less than 1e-4 is met once in thousands of tokens.
    assert near_ties <= len(chats) // 4
