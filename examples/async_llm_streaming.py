"""Print each answer's text as it is generated, with the new part alone in every item."""

import asyncio
import sys

from reprise import AsyncEngineArgs, AsyncLLM, SamplingParams
from reprise.sampling_params import RequestOutputKind

PROMPTS = ["Once upon a time", "12 + 30 =", "Once upon a time, in the forest,"]


async def stream_response(engine: AsyncLLM, prompt: str, request_id: str) -> None:
    sampling_params = SamplingParams(
        max_tokens=40,
        temperature=0.8,
        top_p=0.95,
        seed=42,
        output_kind=RequestOutputKind.DELTA,
    )
    print(f"{prompt}", end="", flush=True)
    async for output in engine.generate(
        request_id=request_id, prompt=prompt, sampling_params=sampling_params
    ):
        for completion in output.outputs:
            if completion.text:
                print(completion.text, end="", flush=True)
        if output.finished:
            print(f"\n[{output.outputs[0].finish_reason}]\n")


async def main(model: str | None = None) -> None:
    engine_args = AsyncEngineArgs(model=model, enforce_eager=True)
    engine = AsyncLLM.from_engine_args(engine_args)
    try:
        for number, prompt in enumerate(PROMPTS, 1):
            await stream_response(engine, prompt, f"stream-{number}")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
