"""DeepSeek-V4 (DeepSeek-AI 2026): residual streams, compressed attention, experts by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reprise.cache import Batch
from reprise.errors import ModelError
from reprise.layers import (
    AttentionSizes,
    Build,
    CausalLM,
    CompressedAttention,
    Depth,
    Embedding,
    HyperConnection,
    HyperHead,
    Linear,
    Mixing,
    RMSNorm,
    Routing,
    ScoredMLP,
    StoredModel,
    Streams,
    Taps,
    parameters_of,
    rotary_table,
    tensor,
    wide_norm,
)
from reprise.models.config_reader import (
    Config,
    flag,
    head_size,
    layer_count,
    layer_kinds,
    norm_eps,
    require,
    require_sizes,
    whole_number,
    window_size,
)
from reprise.models.deepseek_v4_names import next_renames, renames

_WINDOW = "sliding_attention"
_RATIOS = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
"""Tokens of a compressed row, by the kind of layer; those of 4 overlap and have an indexer."""
_EXPERTS = ("hash_moe", "moe")
_TARGETS = ("layers.", "embed.", "head.", "norm.", "hc_head_", "model.", "lm_head.",
            "mtp.0.emb", "mtp.0.head.")  # fmt: skip
"""What a checkpoint has beside the layer that drafts; some have embedding and head twice."""
_SIZES = ("q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim",
          "index_topk", "hc_mult", "hc_sinkhorn_iters", "n_routed_experts",
          "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")  # fmt: skip


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    _refuse_others(config, build)
    hidden, eps = config.hidden_size, norm_eps(config)
    layers = layer_count(config)
    kinds = layer_kinds(config, (_WINDOW, *_RATIOS))
    sizes = _attention_sizes(config)
    mixing = _mixing(config)
    main, compress = (_table(config, build, name) for name in ("main", "compress"))

    def layer(number: int) -> _Layer:
        here = build.at(f"model.layers.{number}")
        every = _RATIOS.get(kinds[number], 0)
        attention = CompressedAttention(
            here.at("attn"), sizes, compress if every else main, every=every, overlap=every == 4
        )
        hashed = config.mlp_layer_types[number] == "hash_moe"
        return _Layer(here, mixing, attention, _experts(config, here.at("ffn"), hashed=hashed))

    decoder = _Decoder(
        Embedding(build, config.vocab_size, hidden),
        [layer(number) for number in range(layers)],
        wide_norm(build.at("model.norm"), hidden, eps),
        HyperHead(build.at("model.hc_head"), mixing),
    )
    return CausalLM(
        build, decoder, config.vocab_size, hidden,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        renames=renames(layers), others=("mtp.",),
    )  # fmt: skip


def build_mtp(config: Config, build: Build, target: CausalLM) -> NextStreams:
    """See :func:`reprise.models.registry.build_mtp`."""
    _refuse_others(config, build)
    block = getattr(config, "dspark_block_size", None)
    if block is not None or whole_number(config, "num_nextn_predict_layers") != 1:
        kind = f"num_nextn_predict_layers={config.num_nextn_predict_layers}"
        raise ModelError(
            f"the drafter of this checkpoint ({kind if block is None else 'DSpark'}) is not "
            f"supported for {config.model_type!r}; use 'method': 'ngram', which drafts from the "
            "text itself, or 'draft_model'"
        )
    return NextStreams(config, build, target)


class NextStreams(StoredModel):
    """The layer that drafts further tokens: it reads the target's streams, not one hidden state.

    Row i takes the streams at position i and the embedding of token i + 1, and its own streams are
    what the next pass goes on from. The embedding and the last product are the target's.

    Args:
        config: The target's.
        build: How to make it: as the target.
        target: Whose streams it reads.
    """

    def __init__(self, config: Config, build: Build, target: CausalLM) -> None:
        super().__init__(renames=next_renames(), others=_TARGETS)
        self.mixing = _mixing(config)
        count, hidden = self.mixing.streams, self.mixing.hidden_size
        self.taps: tuple[Depth, ...] = tuple(map(stream, range(count)))
        self.hidden_size, self.vocab_size = count * hidden, target.vocab_size
        here = build.at("mtp.0")
        attention = CompressedAttention(
            here.at("attn"), _attention_sizes(config), _table(config, build, "main")
        )
        mlp = _experts(config, here.at("ffn"), hashed=False)
        layer = _NextLayer(here, self.mixing, attention, mlp)
        self.mtp, self._layer = nn.ModuleList([layer]), (layer,)
        # A tuple hides modules of the target from the walk over this one's own.
        self._target = (target.model.embed_tokens, target.lm_head)

    def prepare(self, taps: Tensor) -> Tensor:
        """The target's streams [T, n * D], as they are."""
        return taps

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Compute one pass.

        Args:
            batch: Of which ``token_ids`` are the tokens behind the rows'.
            hidden: [T, n * D], the target's streams, or what this gave for the rows before them;
                not changed.

        Returns:
            [T, n * D], of which :meth:`logits` are and from which the next pass goes on.
        """
        embedded = self._target[0](batch.token_ids)
        given = hidden.unflatten(1, (self.mixing.streams, -1))
        return self._layer[0].further(embedded, given, batch)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[R, n * D] to [R, V], in ``out``."""
        self._target[1].into(self._layer[0].collapsed(hidden), out)
        return out

    def token_ids(self, drafts: Tensor) -> Tensor:
        """The drafts themselves: the tokens are the target's."""
        return drafts


def stream(number: int) -> Depth:
    """The name of a stream behind the last layer."""
    return f"stream {number}"


class _Layer(nn.Module):
    """Attention, then experts, each between the streams."""

    def __init__(
        self, build: Build, mixing: Mixing, attention: CompressedAttention, mlp: ScoredMLP
    ) -> None:
        super().__init__()
        sizes = mixing.hidden_size, mixing.norm_eps
        self.attn_norm = wide_norm(build.at("attn_norm"), *sizes)
        self.ffn_norm = wide_norm(build.at("ffn_norm"), *sizes)
        self.hc_attn = HyperConnection(build, "hc_attn", mixing, self.attn_norm)
        self.hc_ffn = HyperConnection(build, "hc_ffn", mixing, self.ffn_norm)
        self.attn, self.ffn = attention, mlp

    def forward(self, streams: Streams, y: Tensor, batch: Batch) -> Tensor:
        """What its last sublayer gives, [T, D]; ``y`` is what the one before it gave."""
        y = tensor(self.attn(self.hc_attn(streams, y), batch))
        return tensor(self.ffn(self.hc_ffn(streams, y), batch))


class _NextLayer(_Layer):
    """A layer with what its streams are made of, and what is made of them."""

    def __init__(
        self, build: Build, mixing: Mixing, attention: CompressedAttention, mlp: ScoredMLP
    ) -> None:
        super().__init__(build, mixing, attention, mlp)
        size, eps = mixing.hidden_size, mixing.norm_eps
        self.enorm = wide_norm(build.at("enorm"), size, eps)
        self.hnorm = wide_norm(build.at("hnorm"), size, eps)
        self.e_proj = Linear(build.at("e_proj"), size, size)
        self.h_proj = Linear(build.at("h_proj"), size, size)
        self.norm = wide_norm(build.at("norm"), size, eps)
        self.hc_head = HyperHead(build.at("hc_head"), mixing)

    def further(self, embedded: Tensor, given: Tensor, batch: Batch) -> Tensor:
        """embedded: [T, D]; given: [T, n, D], not changed. Returns [T, n * D]."""
        count = given.shape[1]
        values = self.h_proj(self.hnorm(given).flatten(0, 1)).unflatten(0, (-1, count))
        streams = Streams.kept(values.contiguous())
        y = self(streams, self.e_proj(self.enorm(embedded)), batch)
        self.hc_head(streams, y)
        return streams.values.flatten(1)

    def collapsed(self, hidden: Tensor) -> Tensor:
        """The normalised sum [R, D] of streams [R, n * D], which are not changed."""
        values = hidden.unflatten(1, (self.hc_head.mixing.streams, -1)).clone()
        streams = Streams.kept(values)
        found: Tensor = self.norm(self.hc_head(streams, torch.zeros_like(values[:, 0])))
        return found


class _Decoder(nn.Module):
    """Embedding, layers, the sum of the streams, the last norm."""

    def __init__(
        self, embedding: Embedding, layers: list[_Layer], norm: RMSNorm, head: HyperHead
    ) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self.norm, self.hc_head = norm, head

    def forward(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Normalised hidden states [T, D].

        Raises:
            ModelError: ``taps`` asks for hidden states between layers, of which there are several.
        """
        y = self.embed_tokens(batch.token_ids)
        streams = Streams.begin(y, self.hc_head.mixing.streams)
        for layer in self.layers:
            y = layer(streams, y, batch)
        hidden: Tensor = self.norm(self.hc_head(streams, y))
        if taps is not None:
            if any(isinstance(depth, int) for depth in taps.depths):
                raise ModelError(
                    f"hidden states at depths {taps.depths}: between layers this model has "
                    "several streams, which no such head is made for; use 'method': 'mtp' or "
                    "'ngram'"
                )
            taps.take("final", hidden)
            for number, each in enumerate(streams.values.unbind(1)):
                taps.take(stream(number), each)
        return hidden


def _experts(config: Config, build: Build, *, hashed: bool) -> ScoredMLP:
    inner = whole_number(config, "moe_intermediate_size")
    routing = Routing(
        whole_number(config, "n_routed_experts"),
        whole_number(config, "num_experts_per_tok"),
        scoring=config.scoring_func,
        scale=float(config.routed_scaling_factor),
    )
    return ScoredMLP(
        build, config.hidden_size, inner, routing, shared_size=inner,
        limit=float(config.swiglu_limit), table_size=config.vocab_size if hashed else 0,
    )  # fmt: skip


def _attention_sizes(config: Config) -> AttentionSizes:
    heads, groups = config.num_attention_heads, whole_number(config, "o_groups")
    if heads % groups:
        raise ModelError(
            f"config field num_attention_heads={heads} must be a multiple of o_groups={groups}"
        )
    return AttentionSizes(
        hidden_size=config.hidden_size,
        heads=heads,
        head_size=head_size(config),
        query_rank=config.q_lora_rank,
        groups=groups,
        output_rank=config.o_lora_rank,
        window=window_size(config),
        eps=norm_eps(config),
        index_heads=config.index_n_heads,
        index_size=config.index_head_dim,
        index_top=config.index_topk,
    )


def _mixing(config: Config) -> Mixing:
    return Mixing(
        config.hc_mult, config.hidden_size, config.hc_sinkhorn_iters, float(config.hc_eps),
        norm_eps(config),
    )  # fmt: skip


def _table(config: Config, build: Build, name: str) -> Tensor:
    """The rotary table of window layers (``main``) or of layers with compressed rows."""
    parameters = config.rope_parameters
    found = parameters.get(name) if isinstance(parameters, Mapping) else None
    if not isinstance(found, Mapping):
        raise ModelError(
            f"config field rope_parameters={parameters!r} must have an object {name!r}"
        )
    said: dict[str, Any] = {each: value for each, value in found.items() if each != "type"}
    takes = parameters_of(said.get("rope_type", "default")) or said.keys()
    unknown = sorted(said.keys() - takes)
    if unknown:
        raise ModelError(
            f"rope_parameters of {name!r} have {', '.join(unknown)}, which rope_type="
            f"{said.get('rope_type')!r} does not take"
        )
    if said.get("attention_factor") not in (None, 1):
        raise ModelError(
            f"rope_parameters attention_factor={said['attention_factor']!r} is not supported for "
            f"{config.model_type!r}; supported: 1, which its models were trained with"
        )
    if said.get("rope_type") == "yarn":
        said["attention_factor"] = 1.0
    table = rotary_table(
        said,
        head_size=head_size(config),
        max_position_embeddings=config.max_position_embeddings,
        length=build.max_model_len,
        device=build.device,
    )
    if table.shape[1] > config.index_head_dim:
        raise ModelError(
            f"config field index_head_dim={config.index_head_dim} must be at least the "
            f"{table.shape[1]} channels that rotate"
        )
    return table


def _refuse_others(config: Config, build: Build) -> None:
    """What is of this family and not computed here."""
    require_sizes(config)
    require(
        config, hidden_act="silu", attention_bias=False, mlp_bias=False, num_key_value_heads=1,
        scoring_func="sqrtsoftplus", topk_method="noaux_tc", n_shared_experts=1,
        norm_topk_prob=True,
    )  # fmt: skip
    for name in _SIZES:
        whole_number(config, name)
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ModelError(
            f"config field num_experts_per_tok={config.num_experts_per_tok} must be at most "
            f"n_routed_experts={config.n_routed_experts}"
        )
    for name in ("swiglu_limit", "routed_scaling_factor", "hc_eps"):
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ModelError(f"config field {name}={value!r} must be a number above 0")
    rates = config.compress_rates
    if rates != _RATIOS:
        raise ModelError(
            f"config field compress_rates={rates!r} is not supported; supported: {_RATIOS}"
        )
    kinds = config.mlp_layer_types
    if len(kinds) != layer_count(config) or any(each not in _EXPERTS for each in kinds):
        raise ModelError(
            f"config field mlp_layer_types={kinds!r} must be one of {', '.join(_EXPERTS)} for "
            "each layer"
        )
