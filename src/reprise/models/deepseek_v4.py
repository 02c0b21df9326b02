"""DeepSeek-V4 (DeepSeek-AI 2026): residual streams, compressed attention, experts by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reprise.cache import Batch
from reprise.errors import ModelError
from reprise.layers import (
    AttentionSizes,
    Build,
    CausalLM,
    CompressedAttention,
    Embedding,
    HyperConnection,
    HyperHead,
    Mixing,
    RMSNorm,
    Routing,
    ScoredMLP,
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
from reprise.models.mtp import NextTokens

_WINDOW = "sliding_attention"
_RATIOS = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
"""Tokens of a compressed row, by the kind of layer; those of 4 overlap and have an indexer."""
_EXPERTS = ("hash_moe", "moe")
_SIZES = ("q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim",
          "index_topk", "hc_mult", "hc_sinkhorn_iters", "n_routed_experts",
          "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")  # fmt: skip


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    build.group.refuse("DeepSeek-V4")
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
        renames=_renames(layers), others=("mtp.",),
    )  # fmt: skip


def build_mtp(config: Config, build: Build, target: CausalLM) -> NextTokens:
    """See :func:`reprise.models.registry.build_mtp`: what this family drafts with is not computed
    here.

    Raises:
        ModelError: Always.
    """
    block = getattr(config, "dspark_block_size", None)
    kind = "one layer, mtp.0" if block is None else f"DSpark, dspark_block_size={block}"
    raise ModelError(
        f"the drafter of this checkpoint ({kind}) is not supported for {config.model_type!r}; use "
        "'method': 'ngram', which drafts from the text itself, or 'draft_model'"
    )


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
            if any(depth != "final" for depth in taps.depths):
                raise ModelError(
                    f"hidden states at depths {taps.depths}: between layers this model has "
                    "several streams, which no head is made for; use 'method': 'ngram'"
                )
            taps.take("final", hidden)
        return hidden


def _experts(config: Config, build: Build, *, hashed: bool) -> ScoredMLP:
    inner = whole_number(config, "moe_intermediate_size")
    routing = Routing(
        whole_number(config, "n_routed_experts"),
        whole_number(config, "num_experts_per_tok"),
        flag(config, "norm_topk_prob"),
        config.scoring_func,
        float(config.routed_scaling_factor),
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
    if config.model_type != "deepseek_v4":  # such as deepseek_v41
        raise ModelError(
            f"model_type={config.model_type!r} is another architecture than 'deepseek_v4', which "
            "is not supported"
        )
    require_sizes(config)
    require(
        config, hidden_act="silu", attention_bias=False, mlp_bias=False, num_key_value_heads=1,
        scoring_func="sqrtsoftplus", topk_method="noaux_tc", n_shared_experts=1,
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
    if build.cache_dtype is not None:
        raise ModelError(
            "kv_cache_dtype='fp8' is not supported for 'deepseek_v4'; leave it out: keys and "
            "values are kept in the compute dtype"
        )


_MODULES = {
    "self_attn.q_a_proj.": "attn.wq_a.",
    "self_attn.q_a_norm.": "attn.q_norm.",
    "self_attn.q_b_proj.": "attn.wq_b.",
    "self_attn.kv_proj.": "attn.wkv.",
    "self_attn.kv_norm.": "attn.kv_norm.",
    "attn.norm.": "attn.kv_norm.",
    "self_attn.o_a_proj.": "attn.wo_a.",
    "self_attn.o_b_proj.": "attn.wo_b.",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.": "attn.compressor.",
    "self_attn.compressor.kv_proj.": "attn.compressor.wkv.",
    "self_attn.compressor.gate_proj.": "attn.compressor.wgate.",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.": "attn.compressor.norm.",
    "self_attn.compressor.indexer.kv_proj.": "attn.indexer.compressor.wkv.",
    "self_attn.compressor.indexer.gate_proj.": "attn.indexer.compressor.wgate.",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.": "attn.indexer.compressor.norm.",
    "self_attn.compressor.indexer.q_b_proj.": "attn.indexer.wq_b.",
    "self_attn.compressor.indexer.scorer.weights_proj.": "attn.indexer.weights_proj.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "attn_hc.": "hc_attn_",
    "ffn_hc.": "hc_ffn_",
    "mlp.": "ffn.",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.": "ffn.shared_experts.w1.",
    "mlp.shared_experts.up_proj.": "ffn.shared_experts.w3.",
    "mlp.shared_experts.down_proj.": "ffn.shared_experts.w2.",
}
"""transformers' modules of a layer, and what released checkpoints call them; one of its own names
is what it writes for the norm of keys."""


def _renames(layers: int) -> dict[str, str]:
    """Of the names of released checkpoints, of what transformers makes of them when it saves, and
    of its modules."""
    found = {
        "embed.": "model.embed_tokens.",
        "head.": "lm_head.",
        "norm.": "model.norm.",
        "hc_head_": "model.hc_head_",
        "layers.": "model.layers.",
        "model.hc_head.hc_": "model.hc_head_",
    }
    for number in range(layers):
        for theirs, ours in _MODULES.items():
            for prefix in ("layers", "model.layers"):
                found[f"{prefix}.{number}.{theirs}"] = f"model.layers.{number}.{ours}"
    return found
