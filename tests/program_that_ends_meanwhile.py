"""``program_that_ends_meanwhile.py MODEL DEVICE``: its AsyncLLM computes when it ends."""

import asyncio
import sys
import threading

import torch

from reprise import AsyncLLM, SamplingParams

llm = AsyncLLM(
    sys.argv[1], device=sys.argv[2], dtype="float32", num_blocks=65, skip_tokenizer_init=True,
    graph_mode="none",
)  # fmt: skip
within, step = threading.Event(), llm.engine.step
square = torch.ones(2000, 2000)


def slow():
    within.set()
    square @ square
    return step()


llm.engine.step = slow


async def last():
    params = SamplingParams(max_tokens=100, ignore_eos=True, detokenize=False)
    async for _ in llm.generate({"prompt_token_ids": [1]}, params):
        pass


async def main():
    task = asyncio.create_task(last())
    while not within.is_set():
        assert not task.done()
        await asyncio.sleep(0.001)
    sys.exit(3)


asyncio.run(main())
