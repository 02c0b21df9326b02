"""Read more than a model was trained for: YaRN stretches its positions.

The demo model was made for 2048 positions; here it has four times as many. For another model give
its rope_theta and max_position_embeddings: python examples/context_extension.py MODEL THETA LENGTH
"""

import sys

from reprise import LLM, SamplingParams

FACTOR = 4.0


def main(model: str | None = None, rope_theta: str = "10000", original: str = "2048") -> None:
    hf_overrides = {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": float(rope_theta),
            "factor": FACTOR,
            "original_max_position_embeddings": int(original),
        }
    }
    max_model_len = int(int(original) * FACTOR)
    llm = LLM(model=model, hf_overrides=hf_overrides, max_model_len=max_model_len)

    tokenizer = llm.get_tokenizer()
    sentence = "The cat sat in the sun and looked at the birds. "
    repeats = int(original) // len(tokenizer.encode(sentence)) + 10
    prompt = "Once upon a time there was a cat. " + sentence * repeats + "Then the cat"

    sampling_params = SamplingParams(temperature=0.0, max_tokens=40)
    output = llm.generate(prompt, sampling_params)[0]
    print(f"Prompt: {len(output.prompt_token_ids)} tokens of {max_model_len}")
    print(f"Answer: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
