"""Complete a few prompts at once.

Without a model the bundled demo model answers; give any checkpoint: python examples/basic.py MODEL
"""

import sys

from reprise import LLM, SamplingParams

PROMPTS = ["Once upon a time", "47 + 38 =", "Once upon a time, in the forest,"]


def main(model: str | None = None) -> None:
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=40)
    llm = LLM(model=model)
    outputs = llm.generate(PROMPTS, sampling_params)
    for output in outputs:
        print(f"Prompt:    {output.prompt!r}")
        print(f"Completed: {output.outputs[0].text!r}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
