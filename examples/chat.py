"""Answer a conversation, several at once, and one with another template."""

import sys

from reprise import LLM

CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Tell me a story about a cat."},
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def show(outputs) -> None:
    for output in outputs:
        print(f"Prompt: {output.prompt!r}\nAnswer: {output.outputs[0].text!r}\n{'-' * 60}")


def main(model: str | None = None) -> None:
    llm = LLM(model=model)
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = 40
    sampling_params.seed = 1

    show(llm.chat(CONVERSATION, sampling_params, use_tqdm=False))

    shorter = sampling_params.clone()
    shorter.max_tokens = 10
    conversations = [CONVERSATION for _ in range(3)]
    show(llm.chat(messages=conversations, sampling_params=shorter, use_tqdm=True))

    show(llm.chat(CONVERSATION, shorter, chat_template=TEMPLATE))


if __name__ == "__main__":
    main(*sys.argv[1:])
