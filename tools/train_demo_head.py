"""Train the EAGLE-3 head that ships with the demo model.

The head learns to draft what the demo model would say next, at the first token and along a chain of
its own drafts: at step s of a row it gets its own output of step s - 1 (as it will when it drafts)
and the text's tokens. Labels are the target's distributions. Training text is that of
`train_demo.py`; the target is frozen.

    python tools/train_demo_head.py --out src/reprise/demo_model/eagle3 --minutes 55

writes a checkpoint as SpecForge does, reads it back in float32 and prints how many tokens a step
brings on what the target says (:mod:`draft_head`), of stories, copies and sums that training does
not show and of four questions in a chat. The exit status is 1 when that is below a gate.
`docs/speculation.md` holds the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from draft_head import Head, HeadConfig, measure, read_head
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from train_demo import (
    SEED,
    Batches,
    Pool,
    build_stream,
    chat,
    copy_items,
    descend,
    held_out_pairs,
    make_rng,
    tell_story,
)
from transformers import Qwen3ForCausalLM

AUX_LAYERS = (1, 3, 5)
DRAFT_VOCAB = 1536


def new_head(model: Qwen3ForCausalLM, target_ids: Tensor) -> Head:
    """Starts as the target's last auxiliary state under the target's head, and noise beside."""
    config = model.config
    width, size = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape) * 0.02

    embedding = model.get_input_embeddings().weight.detach().float().cpu()
    tensors = {
        "fc.weight": torch.cat([torch.zeros(width, 2 * width), torch.eye(width)], 1),
        "layers.0.self_attn.q_proj.weight": noise(queries, 2 * width),
        "layers.0.self_attn.k_proj.weight": noise(keys, 2 * width),
        "layers.0.self_attn.v_proj.weight": noise(keys, 2 * width),
        "layers.0.self_attn.o_proj.weight": noise(width, queries),
        "layers.0.mlp.gate_proj.weight": noise(config.intermediate_size, width),
        "layers.0.mlp.up_proj.weight": noise(config.intermediate_size, width),
        "layers.0.mlp.down_proj.weight": noise(width, config.intermediate_size),
        "layers.0.input_layernorm.weight": torch.ones(width),
        "layers.0.hidden_norm.weight": torch.ones(width),
        "layers.0.post_attention_layernorm.weight": torch.ones(width),
        "norm.weight": torch.ones(width),
        "lm_head.weight": embedding[target_ids].clone(),
    }
    head_config = HeadConfig(
        rope=model.model.rotary_emb,
        num_heads=config.num_attention_heads,
        head_dim=size,
        eps=config.rms_norm_eps,
        aux_layers=AUX_LAYERS,
    )
    d2t = target_ids - torch.arange(len(target_ids))
    return Head(head_config, tensors, embedding, d2t)


def draft_vocabulary(stream: Pool, size: int) -> Tensor:
    """The tokens that are said most often, ascending [size] int64."""
    import numpy as np

    said = stream.ids[stream.learned].astype(np.int64)
    counts = torch.from_numpy(np.bincount(said))
    chosen = counts.topk(size).indices.sort().values
    share = counts[chosen].sum() / counts.sum()
    print(f"draft vocabulary: {size} tokens, {share:.4f} of what is said", flush=True)
    return chosen


def losses(
    head: Head, model: Qwen3ForCausalLM, batch: tuple[Tensor, Tensor, Tensor], steps: int
) -> list[Tensor]:
    """Of each step of the chains: cross entropy with the target's distribution over the draft
    vocabulary, where the text is the target's to say and its first choice can be drafted."""
    ids, labels, mask = batch
    length = ids.shape[1]
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        aux = torch.stack([output.hidden_states[v] for v in head.config.aux_layers], 2).float()
        logits = output.logits.float()
        can = torch.isin(logits.argmax(-1), head.target_ids) & (labels >= 0)
        wanted = logits[..., head.target_ids].softmax(-1)
    found = []
    memory = head.new_memory()
    hidden = head.combine(aux)
    for step in range(steps):
        ahead = step + 1
        # Rows whose token ahead is beyond the end go on with any token, and count for nothing.
        tokens = functional.pad(ids[:, ahead:], (0, ahead))
        hidden, drafted = head.step(hidden, tokens, step, memory, mask)
        rows = length - ahead
        # A row's own document alone: what is ahead sees the row.
        same = mask[:, 0].diagonal(-ahead, 1, 2)
        counts = can[:, ahead:] & same
        picked = drafted[:, :rows][counts].float()
        found.append(functional.cross_entropy(picked, wanted[:, ahead:][counts]))
    return found


def train(head: Head, model: Qwen3ForCausalLM, stream: Pool, args: argparse.Namespace) -> None:
    """Train in place until the minutes are used up, on a cosine that fits them."""
    device = next(model.parameters()).device
    batches = Batches(stream, device)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    scales = [args.decay**step for step in range(args.steps)]
    begin = saved = time.perf_counter()
    step = tokens = 0
    progress = 0.0
    while progress < 1:
        row = args.row if progress < 0.8 else args.last_row
        batch = batches.draw(max(2, args.batch_tokens // row), row)
        steps = args.steps if progress >= args.early else min(args.early_steps, args.steps)
        with torch.autocast(device.type, torch.bfloat16):
            found = losses(head, model, batch, steps)
        loss = sum(scale * each for scale, each in zip(scales, found, strict=False))
        loss.backward()
        rate = args.learning_rate * min(1.0, (step + 1) / args.warmup)
        rate = descend(head, optimizer, rate, progress)
        step += 1
        tokens += batch[0].numel()
        now = time.perf_counter()
        if step % 50 == 0 or step < 4:
            each = " ".join(f"{value.item():.3f}" for value in found)
            print(
                f"step {step}  losses {each}  lr {rate:.2e}  progress {progress:.2f}"
                f"  {now - begin:.1f} s  {tokens / (now - begin) / 1e3:.2f}k tokens/s",
                flush=True,
            )
        if args.save_every and now - saved > 60 * args.save_every:
            save(head, model, args.out)
            saved = now
        progress = (now - begin) / 60 / args.minutes
    print(json.dumps({"steps": step, "tokens": tokens}), flush=True)


def save(head: Head, model: Qwen3ForCausalLM, out: Path) -> None:
    """Write a checkpoint as SpecForge does, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {
        name.replace("layers.0.", "midlayer."): each.to(torch.bfloat16).contiguous()
        for name, each in head.named_tensors().items()
    }
    ids = head.target_ids.cpu()
    known = torch.zeros(config.vocab_size, dtype=torch.bool)
    known[ids] = True
    tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": known}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    content = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": len(ids),
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eagle_config": {
            # The layers whose outputs are taken, as SpecForge counts them.
            "eagle_aux_hidden_state_layer_ids": [v - 1 for v in head.config.aux_layers],
            "use_aux_hidden_state": True,
        },
    }
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")


GATES = {0.0: 2.8, 0.7: 2.6}
"""Tokens that a step must bring on stories, with four drafts, by temperature."""


def evaluate(target: Path, path: Path) -> bool:
    """Print what the head in a directory brings; whether that passes the gates."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    model = Qwen3ForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    head = read_head(path, model)
    rng = make_rng("held-out stories")
    stories = [" ".join(tell_story(rng).text.split()[:6]) for _ in range(12)]
    copies = [f"Copy: {copy_items(rng)}\n" for _ in range(12)]
    questions = ("Tell me a story about a fox.", "Tell me a story about a dragon named Ruby.",
                 "who are you?", "Tell me a story about a queen.")  # fmt: skip
    tasks: dict[str, tuple[list[str], Sequence[float]]] = {
        "stories": (stories, tuple(GATES)),
        "chats": ([chat([(each, "")])[0][0] for each in questions], (0.0,)),
        "copies": (copies, (0.0,)),
        "additions": ([f"{a} + {b} =" for a, b in held_out_pairs()[:20]], (0.0,)),
    }
    passed = True
    for name, (texts, temperatures) in tasks.items():
        prompts = [tokenizer.encode(text).ids for text in texts]
        for temperature in temperatures:
            found = measure(head, model, prompts, 4, 220, temperature)
            print(f"{name}, temperature {temperature:g}: {found.told()}", flush=True)
            passed &= name != "stories" or found.length >= GATES[temperature]
    return passed


def parse_arguments() -> argparse.Namespace:
    """The flags; those that shaped the shipped head have the values it was made with."""
    parser = argparse.ArgumentParser(description="Train the demo model's EAGLE-3 head.")
    parser.add_argument("--target", type=Path, default=Path("src/reprise/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("src/reprise/demo_model/eagle3"))
    parser.add_argument("--go-on", type=Path, help="a head to begin with, of the same tokens")
    parser.add_argument("--device", default="cpu", help="any torch device")
    parser.add_argument("--minutes", type=float, default=55, help="time limit of the training")
    parser.add_argument("--steps", type=int, default=5, help="drafts of a chain that are trained")
    parser.add_argument("--early-steps", type=int, default=3, help="drafts of a chain at first")
    parser.add_argument("--early", type=float, default=0.5, help="fraction of the time for those")
    parser.add_argument("--decay", type=float, default=0.9, help="weight of a step's loss")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--row", type=int, default=256, help="row length of the first 80 percent")
    parser.add_argument("--last-row", type=int, default=512, help="row length of the rest")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps until the full rate")
    parser.add_argument("--stream-tokens", type=int, default=8_000_000)
    parser.add_argument("--scale", type=float, default=0.06, help="fraction of documents to make")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only-evaluate", action="store_true", help="measure what is in --out")
    parser.add_argument("--save-every", type=float, default=5, help="minutes; 0: at the end alone")
    return parser.parse_args()


def main() -> int:
    """Make the text, train, save and measure."""
    args = parse_arguments()
    if args.only_evaluate:
        return 0 if evaluate(args.target, args.out) else 1
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    stream = build_stream(tokenizer, args.stream_tokens, args.scale, args.workers)
    print(f"{len(stream.ids)} tokens after {time.perf_counter() - begin:.1f} s", flush=True)
    device = torch.device(args.device)
    model = Qwen3ForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(device).eval()
    if args.go_on:
        head = read_head(args.go_on, model).requires_grad_(True).to(device)
    else:
        head = new_head(model, draft_vocabulary(stream, DRAFT_VOCAB)).to(device)
    print(f"{sum(p.numel() for p in head.parameters())} parameters on {device}", flush=True)
    train(head, model, stream, args)
    save(head, model, args.out)
    return 0 if evaluate(args.target, args.out) else 1


if __name__ == "__main__":
    raise SystemExit(main())
