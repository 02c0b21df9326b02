"""``interrupted_program.py MODEL DEVICE`` generates until it is interrupted, and once more."""

import sys
import time

from helpers import assert_idle, greedy, token_ids

from reprise import LLM, SamplingParams

path, device = sys.argv[1:]
llm = LLM(path, device=device, dtype="float32", num_blocks=129, skip_tokenizer_init=True)
prompt = [1, 2, 3]
expected = token_ids(llm.generate([prompt], greedy(8)))
try:
    print("generating", flush=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        llm.generate([prompt, [4] * 50], SamplingParams(n=3, max_tokens=200, ignore_eos=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert_idle(llm)
assert token_ids(llm.generate([prompt], greedy(8))) == expected
print("same tokens", flush=True)
