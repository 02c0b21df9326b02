"""What people put in front of a server: LiteLLM, LangChain and lm-eval, where they are installed.

``pip install litellm langchain-openai 'lm_eval[api]'`` runs these tests. The oracle is the plain
HTTP answer, and of lm-eval (``--long``) the same tasks through :class:`LLM`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from http_server import Server
from pydantic import BaseModel

from reprise import LLM, SamplingParams
from reprise.loading.checkpoint import DEMO_MODEL

ASK = [{"role": "user", "content": "What is 12 + 30?"}]
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def plain(server: Server) -> str:
    body = {"model": "demo", "messages": ASK, **OPTIONS}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    text = reply["choices"][0]["message"]["content"]
    assert text
    return str(text)


def test_litellm(server: Server, plain: str) -> None:
    litellm = pytest.importorskip("litellm")
    for provider in ("openai", "hosted_vllm"):
        there = {"model": f"{provider}/demo", "api_base": f"{server.url}/v1", "api_key": "none"}
        reply = litellm.completion(messages=ASK, **there, **OPTIONS)
        assert reply.choices[0].message.content == plain
        assert reply.usage.completion_tokens > 0
        chunks = litellm.completion(messages=ASK, stream=True, **there, **OPTIONS)
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == plain
        with pytest.raises(litellm.exceptions.BadRequestError):
            litellm.completion(messages=ASK, **there, temperature=-1)


class City(BaseModel):
    name: Literal["Rome", "Oslo"]


def test_langchain(server: Server, plain: str) -> None:
    package = pytest.importorskip("langchain_openai")
    model = package.ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key="none", **OPTIONS)
    asked = ASK[0]["content"]
    reply = model.invoke(asked)
    assert reply.content == plain
    assert reply.usage_metadata["output_tokens"] > 0
    assert "".join(each.content for each in model.stream(asked)) == plain
    assert [each.content for each in model.batch([asked, asked])] == [plain, plain]
    pytest.importorskip("xgrammar")
    options = {**OPTIONS, "max_tokens": 200}
    for responses in (False, True):
        model = package.ChatOpenAI(
            model="demo", base_url=f"{server.url}/v1", api_key="none", **options,
            use_responses_api=responses,
        )  # fmt: skip
        assert model.invoke(asked).text.startswith(plain)
        answer = model.with_structured_output(City, method="json_schema").invoke(asked)
        assert isinstance(answer, City)


def direct(llm: LLM) -> Any:
    """The same engine without a server, for lm-eval."""
    from lm_eval.api.model import TemplateLM

    tokenizer = llm.get_tokenizer()

    class Direct(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            return list(tokenizer.encode(string))

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
            prompts = [{"prompt_token_ids": [*before, *behind]} for _, before, behind in requests]
            found = []
            outputs = llm.generate(prompts, params)
            for (_, before, behind), output in zip(requests, outputs, strict=True):
                assert output.prompt_logprobs is not None
                pairs = list(zip(output.prompt_logprobs[len(before) :], behind, strict=True))
                whole = sum(each[token].logprob for each, token in pairs if each is not None)
                greedy = all(each is not None and each[token].rank == 1 for each, token in pairs)
                found.append((whole, greedy))
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found = []
            for each in requests:
                prompt, options = each.args
                params = SamplingParams(
                    temperature=0, stop=options["until"], max_tokens=options["max_gen_toks"]
                )
                found.append(llm.generate(prompt, params)[0].outputs[0].text)
            return found

    return Direct()


SUMS = [(a, b) for a in (12, 47, 30) for b in (5, 38)]


def tasks(folder: Path) -> list[dict[str, Any]]:
    """One that chooses by log likelihood, one that writes; of a file beside."""
    rows = [{"ask": f"{a} + {b} =", "choices": [f"{a + b}", f"{a + b + 1}", f"{a}"], "right": 0}
            for a, b in SUMS]  # fmt: skip
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", "doc_to_text": "{{ask}}",
    }  # fmt: skip
    return [
        {**shared, "task": "choose_sums", "output_type": "multiple_choice",
         "doc_to_target": "right", "doc_to_choice": "{{choices}}",
         "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {**shared, "task": "write_sums", "output_type": "generate_until",
         "doc_to_target": "{{choices[0]}}",
         "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
         "metric_list": [{"metric": "exact_match", "ignore_case": True}]},
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("as_tokens", [True, False])
def test_lm_eval(
    server: Server, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_tokens: bool
) -> None:
    """The harness scores a model through the server as it does through :class:`LLM`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    there = completions.LocalCompletionsAPI(
        model="demo", base_url=f"{server.url}/v1/completions", tokenizer=str(DEMO_MODEL),
        tokenizer_backend="huggingface", tokenized_requests=as_tokens, batch_size=4,
        max_length=2048,
    )  # fmt: skip
    results = []
    with LLM(device=device, num_blocks=400) as llm:
        for model in (there, direct(llm)):
            found = lm_eval.simple_evaluate(
                model=model, tasks=tasks(tmp_path), log_samples=True, bootstrap_iters=0
            )
            results.append((found["results"], found["samples"]))
    (scores, samples), (expected_scores, expected) = results
    assert scores["choose_sums"]["acc,none"] > 0.5  # the model can add
    for task in ("choose_sums", "write_sums"):
        numbers = {
            name: value for name, value in scores[task].items() if isinstance(value, int | float)
        }
        assert numbers
        assert numbers == {name: expected_scores[task][name] for name in numbers}
    for one, other in zip(samples["choose_sums"], expected["choose_sums"], strict=True):
        for (value, greedy), (wanted, wants_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert value == pytest.approx(wanted, abs=1e-3)
            assert greedy == wants_greedy
    for one, other in zip(samples["write_sums"], expected["write_sums"], strict=True):
        assert one["filtered_resps"] == other["filtered_resps"]
