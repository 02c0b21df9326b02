"""Prompts with the same beginning compute it once, and their answers stay the same."""

import sys

from reprise import LLM, SamplingParams

PREFIX = (
    "Once upon a time there was a small village by the sea. In the village lived a kind old "
    "woman with three cats, a brave young fisher, and a girl who loved to read. "
)
QUESTIONS = ["The old woman", "The fisher", "The girl", "One of the cats"]


def main(model: str | None = None) -> None:
    prompts = [PREFIX + question for question in QUESTIONS]
    sampling_params = SamplingParams(temperature=0.0, max_tokens=20)

    with LLM(model=model, enable_prefix_caching=False) as regular_llm:
        expected = [each.outputs[0].text for each in regular_llm.generate(prompts, sampling_params)]

    with LLM(model=model, enable_prefix_caching=True) as prefix_cached_llm:
        prefix_cached_llm.generate(prompts[0], sampling_params)  # fills the cache
        outputs = prefix_cached_llm.generate(prompts, sampling_params)

    for output in outputs:
        total = len(output.prompt_token_ids)
        print(f"{output.num_cached_tokens} of {total} prompt tokens came from the cache")
        print(f"{output.prompt[-20:]!r} -> {output.outputs[0].text!r}\n")
    same = expected == [each.outputs[0].text for each in outputs]
    print(f"Generated answers are the same: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
