"""The same seed gives the same tokens, whatever else runs in the batch.

vLLM needs a fixed schedule for that; here a draw depends on its request alone.
"""

import random
import sys

from reprise import LLM, SamplingParams

PROMPTS = ["Once upon a time", "47 + 38 =", "In the forest", "A girl named Mia"]


def main(model: str | None = None) -> None:
    llm = LLM(model=model, seed=42)
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24)

    alone = [llm.generate(prompt, sampling_params)[0].outputs[0].text for prompt in PROMPTS]
    together = [each.outputs[0].text for each in llm.generate(PROMPTS, sampling_params)]
    for prompt, text in zip(PROMPTS, together, strict=True):
        print(f"{prompt!r} -> {text!r}")
    print(f"Alone and in a batch, the same: {alone == together}")
    # The engine's seed is its own; the process's generators are left alone.
    print(f"Still random: {random.randint(0, 2**31)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
