"""Threads that share one LLM: their calls take turns, and each gets what it would get alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from helpers import TinyModels, assert_idle, greedy, make_llm, random_ids, text_model, token_ids

from reprise import SamplingParams

THREADS, CALLS = 3, 3


def test_generate_and_chat(tiny: TinyModels, device: str) -> None:
    model = text_model(tiny)
    llm = make_llm(model, device, num_blocks=24, block_size=8, graph_mode="full",
                   graph_buckets="decode=1,4;mixed=16", max_num_batched_tokens=16)  # fmt: skip
    start = threading.Barrier(THREADS)
    params = [
        greedy(9),
        SamplingParams(temperature=0.9, seed=4, max_tokens=11, presence_penalty=0.5),
    ]

    def calls(thread: int) -> list[list[int]]:
        found = []
        for call in range(CALLS):
            prompts = [random_ids(100 * thread + 10 * call + n, 5 + 7 * n) for n in range(2)]
            found += token_ids(llm.generate(prompts, params, use_tqdm=False))
            message = [{"role": "user", "content": f"{thread} {call}"}]
            found += token_ids(llm.chat(message, params[1], use_tqdm=False))
        return found

    def together(thread: int) -> list[list[int]]:
        start.wait(30)
        return calls(thread)

    expected = [calls(thread) for thread in range(THREADS)]
    over = threading.Event()

    def watch() -> int:
        count = 0
        while not over.wait(0.002):
            llm.stats()
            llm.graph_report()
            count += 1
        return count

    with ThreadPoolExecutor(THREADS + 1) as pool:
        watching = pool.submit(watch)
        try:
            running = [pool.submit(together, thread) for thread in range(THREADS)]
            assert [each.result(60) for each in running] == expected
        finally:
            over.set()
        assert watching.result(60) > 0
    assert_idle(llm)


def test_weights_and_prefix_cache_between_calls(tiny: TinyModels, device: str) -> None:
    """A call sees the weights of before or of after, never of both."""
    models = [tiny("qwen3"), tiny("qwen3", seed=5)]
    llm = make_llm(models[0], device, block_size=8)
    weights = [dict(each.reference.state_dict()) for each in models]
    prompt = random_ids(3, 40)
    over = threading.Event()

    def generate() -> list[int]:
        (output,) = token_ids(llm.generate([prompt], greedy(12), use_tqdm=False))
        return output

    expected = []
    for each in weights[::-1]:
        llm.update_weights(each)
        expected.append(generate())
    assert expected[0] != expected[1]

    def replace() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            llm.update_weights(weights[turn % 2])
            llm.reset_prefix_cache()

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace)
        try:
            assert all(generate() in expected for _ in range(30))
        finally:
            over.set()
        replacing.result(60)
    assert_idle(llm)
