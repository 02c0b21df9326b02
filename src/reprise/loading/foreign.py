"""Say what a directory holds that is not a checkpoint of safetensors files."""

from __future__ import annotations

from pathlib import Path

_TO_SAFETENSORS = (
    "transformers writes safetensors from it: "
    "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
)
_KINDS: tuple[tuple[str, str], ...] = (
    (
        "*.gguf",
        "GGUF, the format of llama.cpp, which is not supported; use the checkpoint in Hugging Face "
        "format that it was made from",
    ),
    ("adapter_config.json", "an adapter without its model; merge it into its base model first"),
    (
        "consolidated*",
        "the model maker's own format, which is not supported; use the checkpoint in Hugging Face "
        "format",
    ),
    (
        "*.bin",
        "pickled PyTorch weights, which can run code and are not read; " + _TO_SAFETENSORS,
    ),
    (
        "*.pt*",
        "pickled PyTorch weights, which can run code and are not read; " + _TO_SAFETENSORS,
    ),
    ("*.h5", "TensorFlow weights, which are not supported"),
    ("*.msgpack", "Flax weights, which are not supported"),
    ("*.onnx", "an ONNX model, which is not supported"),
)


def foreign_content(path: Path) -> str:
    """What else lies in a directory, or is a file, and the remedy; empty if nothing is known."""
    names = sorted(each.name for each in path.iterdir()) if path.is_dir() else [path.name]
    for pattern, meaning in _KINDS:
        found = [name for name in names if Path(name).match(pattern)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"{found[0]}{more}: {meaning}"
    return ""
