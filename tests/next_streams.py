"""A tiny DeepSeek-V4 with its layer for further tokens, and transformers' answer for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from helpers import TinyModel, TinyModels, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

NEXT = {"compress_ratios": [4, 0], "num_hidden_layers": 2, "num_hash_layers": 1}


class NextLayer:
    """A checkpoint with a layer that drafts. transformers has the same as the last layer of a
    longer model; the little that lies between that and the streams is computed here."""

    def __init__(self, tiny: TinyModels, path: Path) -> None:
        plain = tiny("deepseek_v4", **NEXT)
        fields = {**NEXT, "num_hidden_layers": 3, "compress_ratios": [4, 0, 0]}
        self.longer = random_model("deepseek_v4", 3, **fields)
        self.longer.save_pretrained(path)
        found = load_file(plain.path / "model.safetensors")
        for name, each in load_file(path / "model.safetensors").items():
            ours = name.removeprefix("model.").removeprefix("layers.2.")
            ours = ours.replace("attn.norm.", "attn.kv_norm.").replace("hc_head.hc_", "hc_head_")
            if name.startswith(("model.layers.2.", "model.norm.", "model.hc_head.")):
                found[f"mtp.0.{ours}"] = each
        generator = torch.Generator().manual_seed(7)
        size = self.longer.config.hidden_size
        self.beside: dict[str, Tensor] = {}
        for name in ("e_proj", "h_proj", "enorm", "hnorm"):
            shape = (size, size) if name.endswith("proj") else (size,)
            drawn = torch.randn(shape, generator=generator)
            self.beside[name] = drawn * size**-0.5 if len(shape) == 2 else 1 + 0.2 * drawn
            found[f"mtp.0.{name}.weight"] = self.beside[name]
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text((plain.path / "config.json").read_text())
        self.model = TinyModel(path)

    def __call__(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The target's streams [T - 1, n * D], what the layer makes of them with the tokens behind,
        and logits [T - 1, V]."""
        from transformers.masking_utils import create_sliding_window_causal_mask

        target, longer, beside = self.model.reference, self.longer, self.beside
        seen: list[Tensor] = []
        hook = target.model.hc_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def normed(x: Tensor, gain: Tensor) -> Tensor:
            eps = longer.config.rms_norm_eps
            return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

        with torch.no_grad():
            target(torch.tensor([list(ids)]), use_cache=False)
            hook.remove()
            behind = torch.tensor([list(ids[1:])])
            embedded = target.model.embed_tokens(behind)
            first = normed(embedded, beside["enorm"]) @ beside["e_proj"].T
            given = seen[0][:, :-1]
            streams = normed(given, beside["hnorm"]) @ beside["h_proj"].T + first.unsqueeze(2)
            positions = torch.arange(len(ids) - 1).unsqueeze(0)
            mask = create_sliding_window_causal_mask(
                config=longer.config, inputs_embeds=embedded, attention_mask=None,
                past_key_values=None, position_ids=positions,
            )  # fmt: skip
            tables = {
                name: longer.model.rotary_emb(embedded, position_ids=positions, layer_type=name)
                for name in ("main", "compress")
            }
            made = longer.model.layers[2](
                streams, position_embeddings=tables, position_ids=positions,
                attention_mask=mask, input_ids=behind,
            )  # fmt: skip
            logits = target.lm_head(longer.model.norm(longer.model.hc_head(made)))
        return given[0].flatten(1), made[0].flatten(1), logits[0]
