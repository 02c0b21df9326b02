"""An EAGLE-3 head in plain torch, for training and for offline measurements; knows no engine.

The head is that of Li et al. 2025 (EAGLE-3): row i takes the target's states at position i and the
embedding of the token behind, and predicts the one after that. Drafting a chain from row i takes
the head's own output and token instead, at the positions i + 1, i + 2 and so on, where row i sees
the rows up to itself and its own chain. All rows' chains are computed at once: at step s the keys
are those of step 0, causally, and of the steps 1..s of the row itself.

    python tools/draft_head.py --target TARGET --head HEAD --prompt "Once upon a time" --tokens 4

walks the target's own continuation with drafts of the head, in float32, and prints how many tokens
a step brings. An engine that drafts as many must count the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class HeadConfig:
    """What of a head its tensors do not say."""

    rope: nn.Module
    """Gives cosines and sines for positions, as transformers' rotary embeddings do."""
    num_heads: int
    head_dim: int
    eps: float
    aux_layers: tuple[int, ...]
    """Each number v is the state behind v layers of the target."""
    norm_before_residual: bool = False
    norm_output: bool = False


@dataclass
class Memory:
    """Keys and values of one layer: of the rows, and of each step of their chains."""

    rows: tuple[Tensor, Tensor] | None = None
    chain: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Head(nn.Module):
    """The head over named tensors, as checkpoints have them (with ``layers.0`` for ``midlayer``).

    Args:
        config: The rest.
        tensors: By name, without ``d2t`` and ``t2d``.
        embedding: [V, H], of the target; used if ``tensors`` has no ``embed_tokens.weight``.
        d2t: [Vd] int64, what is to be added to a draft's id; None: both vocabularies are the same.
    """

    def __init__(
        self,
        config: HeadConfig,
        tensors: dict[str, Tensor],
        embedding: Tensor,
        d2t: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(each) for name, each in tensors.items()}
        )
        own = tensors.get("embed_tokens.weight")
        self.register_buffer("embedding", embedding if own is None else own, persistent=False)
        ids = torch.arange(len(tensors["lm_head.weight"]), device=embedding.device)
        self.register_buffer("target_ids", ids if d2t is None else ids + d2t, persistent=False)
        self.num_layers = len({n.split(".")[1] for n in tensors if n.startswith("layers.")})
        self.causal: dict[int, Tensor] = {}

    def named_tensors(self) -> dict[str, Tensor]:
        """By the names that checkpoints have."""
        return {name.replace("/", "."): each.detach() for name, each in self.weights.items()}

    def get(self, name: str) -> Tensor | None:
        key = name.replace(".", "/")
        return self.weights[key] if key in self.weights.keys() else None  # noqa: SIM118

    def norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.config.eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.get(f"{name}.weight")
        assert weight is not None, name
        return functional.linear(x, weight, self.get(f"{name}.bias"))

    def combine(self, aux: Tensor) -> Tensor:
        """States of the target [B, T, A, H] to what the head reads of them [B, T, Hd]."""
        if self.get("fc_norm.0.weight") is not None:
            aux = torch.stack(
                [self.norm(each, f"fc_norm.{i}") for i, each in enumerate(aux.unbind(2))], 2
            )
        joined = aux.flatten(2)
        if self.get("input_norm.weight") is not None:
            joined = self.norm(joined, "input_norm")
        return self.linear(joined, "fc")

    def step(
        self, hidden: Tensor, tokens: Tensor, offset: int, memory: list[Memory], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of all rows' chains.

        Args:
            hidden: [B, T, Hd], of the target (step 0, see :meth:`combine`) or of the last step.
            tokens: [B, T] int64, whose successors are predicted.
            offset: Number of the step: row i stands for position i + offset.
            memory: Of each layer, of the steps before; this one's is added.
            mask: [B, 1, T, T] bool: rows that a row sees; None: those up to itself.

        Returns:
            Hidden states for the next step [B, T, Hd] and logits [B, T, Vd].
        """
        x = functional.embedding(tokens, self.embedding)
        for layer in range(self.num_layers):
            name = f"layers.{layer}"
            if layer == 0:
                normed = self.norm(hidden, f"{name}.hidden_norm")
                residual = normed if self.config.norm_before_residual else hidden
                read = torch.cat([self.norm(x, f"{name}.input_layernorm"), normed], -1)
            else:
                residual, read = x, self.norm(x, f"{name}.input_layernorm")
            x = residual + self._attend(read, f"{name}.self_attn", offset, memory[layer], mask)
            read = self.norm(x, f"{name}.post_attention_layernorm")
            gate = functional.silu(self.linear(read, f"{name}.mlp.gate_proj"))
            x = x + self.linear(
                gate * self.linear(read, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
            )
        normed = self.norm(x, "norm")
        return normed if self.config.norm_output else x, self.linear(normed, "lm_head")

    def new_memory(self) -> list[Memory]:
        return [Memory() for _ in range(self.num_layers)]

    def _attend(
        self, x: Tensor, name: str, offset: int, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        rows, length = x.shape[:2]
        size = self.config.head_dim
        query, key, value = (
            self.linear(x, f"{name}.{part}_proj").view(rows, length, -1, size) for part in "qkv"
        )
        if self.get(f"{name}.q_norm.weight") is not None:
            query, key = self.norm(query, f"{name}.q_norm"), self.norm(key, f"{name}.k_norm")
        positions = torch.arange(offset, offset + length, device=x.device)[None]
        cos, sin = self.config.rope(x, positions)
        query, key = (rotate(each.transpose(1, 2), cos, sin) for each in (query, key))
        groups = self.config.num_heads // key.shape[1]
        key = key.repeat_interleave(groups, 1)
        value = value.transpose(1, 2).repeat_interleave(groups, 1)
        if memory.rows is None:
            memory.rows = key, value
        else:
            memory.chain.append((key, value))
        scale = size**-0.5
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = (query @ memory.rows[0].transpose(2, 3)) * scale
        scores = scores.masked_fill(~mask, float("-inf"))
        own = [(query * key).sum(-1, keepdim=True) * scale for key, _ in memory.chain]
        chances = torch.cat([scores, *own], -1).float().softmax(-1).to(value.dtype)
        out = chances[..., :length] @ memory.rows[1]
        for number, (_, v) in enumerate(memory.chain):
            out = out + chances[..., length + number, None] * v
        return self.linear(out.transpose(1, 2).flatten(2), f"{name}.o_proj")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, Hq, T, D], halves side by side."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)


def read_head(path: Path, model: Any) -> Head:
    """A head as SafeAILab, SpecForge or ``speculators`` store it, for a model of transformers."""
    from safetensors.torch import load_file
    from transformers import CONFIG_MAPPING
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = json.loads((path / "config.json").read_text())
    nested = raw.get("eagle_config") or {}
    given = raw.get("transformer_layer_config", raw)
    layers = CONFIG_MAPPING[given["model_type"]](**given)
    ids = "eagle_aux_hidden_state_layer_ids"
    count = model.config.num_hidden_layers
    depths = raw.get(ids) or [2, count // 2, count - 3]
    if nested.get(ids):
        depths = [each + 1 for each in nested[ids]]
    stored = {
        name.removeprefix("model.").replace("midlayer.", "layers.0."): each
        for name, each in load_file(path / "model.safetensors").items()
    }
    stored.pop("t2d", None)
    d2t = stored.pop("d2t", None)
    tensors = {name: each.float() for name, each in stored.items()}
    embedding = model.get_input_embeddings().weight.detach().float()
    if "lm_head.weight" not in tensors:
        tied = raw.get("tie_word_embeddings", False)
        last = tensors.get("embed_tokens.weight", embedding) if tied else model.lm_head.weight
        tensors["lm_head.weight"] = last.detach().float()

    def says(name: str, default: bool = False) -> bool:
        return bool(raw.get(name, nested.get(name, default)))

    config = HeadConfig(
        rope=LlamaRotaryEmbedding(layers),
        num_heads=layers.num_attention_heads,
        head_dim=getattr(layers, "head_dim", None)
        or layers.hidden_size // layers.num_attention_heads,
        eps=layers.rms_norm_eps,
        aux_layers=tuple(depths),
        norm_before_residual=says("norm_before_residual", "transformer_layer_config" in raw),
        norm_output=says("norm_output"),
    )
    return Head(config, tensors, embedding, d2t).requires_grad_(False)


Choose = Callable[[Tensor, Tensor], Tensor]
"""Of logits [T, Vd] of the head and the index of the token [T] that each row drafts, the head's
tokens [T]."""


def greedy(logits: Tensor, _: Tensor) -> Tensor:
    return logits.argmax(-1)


@torch.no_grad()
def draft(
    head: Head, model: Any, ids: Sequence[int], tokens: int, choose: Choose = greedy
) -> Tensor:
    """What the head drafts behind each token of a text: [T, tokens], of which row n is behind the
    first n + 1 tokens; row 0 drafts nothing (-1), since a head begins at the second token."""
    text = torch.tensor([list(ids)])
    states = model(text, output_hidden_states=True).hidden_states
    # transformers gives the last layer's states behind the final norm alone.
    assert max(head.config.aux_layers) < len(states) - 1
    aux = torch.stack([states[v] for v in head.config.aux_layers], 2).float()
    hidden = head.combine(aux[:, :-1])
    memory, found = head.new_memory(), []
    following, rows = text[:, 1:], torch.arange(len(ids) - 1)
    for step in range(tokens):
        hidden, logits = head.step(hidden, following, step, memory, None)
        following = head.target_ids[choose(logits[0], rows + 2 + step)][None]
        found.append(following[0])
    drafts = torch.stack(found, 1)
    return torch.cat([torch.full((1, tokens), -1), drafts])


class Walk(NamedTuple):
    """What a decode with drafts does along a text."""

    accepted: list[int]
    """Drafts that count, of each step."""
    tokens: int

    @property
    def length(self) -> float:
        """Mean tokens a step, the one that the target draws itself included."""
        return 1 + sum(self.accepted) / max(1, len(self.accepted))

    @property
    def rates(self) -> list[float]:
        """Share of steps in which each draft counts."""
        steps = max(1, len(self.accepted))
        return [sum(each > n for each in self.accepted) / steps for n in range(self.tokens)]

    def told(self) -> str:
        """In one line."""
        rates = " ".join(f"{each:.2f}" for each in self.rates)
        return (
            f"{self.length:.2f} tokens a step in {len(self.accepted)} steps of {self.tokens} "
            f"drafts, which count in {rates}"
        )


def walk(drafts: Tensor, ids: Sequence[int], begin: int) -> Walk:
    """Steps along a text whose first ``begin`` tokens are there before the first of them.

    Args:
        drafts: [T, k], see :func:`draft`.
        ids: The text, with what the target says behind the last step too.
        begin: Known tokens: the prompt and the token behind it.
    """
    known, accepted, tokens = begin, [], drafts.shape[1]
    while known < len(ids):
        guesses, right = drafts[known - 1].tolist(), ids[known : known + tokens]
        agree = 0
        while agree < len(right) and guesses[agree] == right[agree]:
            agree += 1
        accepted.append(agree)
        known += agree + 1
    return Walk(accepted, tokens)


@torch.no_grad()
def tell(
    model: Any, ids: Sequence[int], limit: int, temperature: float, numbers: Tensor
) -> list[int]:
    """A text and what the model says behind it: the most likely tokens, or at a temperature those
    at which the cumulative distribution exceeds each token's number. numbers: [T] in [0, 1)."""
    text, known, cache = list(ids), torch.tensor([list(ids)]), None
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    for _ in range(limit):
        output = model(known, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        at = torch.tensor([len(text)])
        text.append(int(drawing(temperature, numbers)(output.logits[0, -1:], at)))
        known = torch.tensor([text[-1:]])
        if text[-1] in stops:
            break
    return text


def drawing(temperature: float, numbers: Tensor) -> Choose:
    """Draws by the inverse of the cumulative distribution, with one number for each token index: as
    the target draws the token at that index, whatever its logits are."""
    if temperature == 0:
        return greedy

    def choose(logits: Tensor, index: Tensor) -> Tensor:
        sums = (logits.double() / temperature).softmax(-1).cumsum(-1)
        chosen = torch.searchsorted(sums, numbers[index, None].double(), right=True)
        return chosen[:, 0].clamp(max=logits.shape[1] - 1)

    return choose


def main() -> None:
    """Print how many tokens a step brings for some prompts, together."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="How often drafts of a head are right.")
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=4, help="drafts of a step")
    parser.add_argument("--limit", type=int, default=256, help="most tokens of a continuation")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    head = read_head(args.head, model)
    prompts = [tokenizer.encode(each, add_special_tokens=False) for each in args.prompt]
    print(measure(head, model, prompts, args.tokens, args.limit, args.temperature).told())


def measure(
    head: Head,
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    limit: int,
    temperature: float,
) -> Walk:
    """The steps along the target's continuations of some prompts, together."""
    accepted: list[int] = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(number)
        numbers = torch.rand(len(prompt) + limit + tokens + 2, generator=generator)
        text = tell(model, prompt, limit, temperature, numbers)
        drafts = draft(head, model, text, tokens, drawing(temperature, numbers))
        accepted += walk(drafts, text, len(prompt) + 1).accepted
    return Walk(accepted, tokens)


if __name__ == "__main__":
    main()
