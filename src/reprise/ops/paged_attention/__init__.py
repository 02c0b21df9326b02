from reprise.ops.cpp import needs_compiler
from reprise.ops.paged_attention.cases import cases
from reprise.ops.paged_attention.reference import reference
from reprise.ops.registry import needs_triton, op
from reprise.platforms import Platform


def _needs_cpu_memory(platform: Platform) -> str | None:
    if platform.device_type == "cpu":
        return None
    return "reads lengths on the host, which would stall an accelerator"


def _needs_whole_prompts(platform: Platform) -> str | None:
    if platform.prompt_attention is None:
        return f"no vendor's kernel was seen to be faster on {platform.name}"
    return needs_triton(platform)


paged_attention = op(
    "paged_attention",
    reference,
    cases=cases,
    mutates=("out",),
    break_op=True,
    extent="seq_lens",
    rows=("query", "out"),
    requests=("block_tables", "seq_lens"),
    graph_support="never",
)
paged_attention.implementation(
    "triton",
    "reprise.ops.paged_attention.triton:paged_attention",
    requires=needs_triton,
    graph_support="always",
)
paged_attention.implementation(
    "prompt",
    "reprise.ops.paged_attention.prompt:paged_attention",
    requires=_needs_whole_prompts,
    graph_support="always",
    on_request="the first whole prompt of a process takes 0.9 s longer, and the first of each "
    "length 0.06 s: the vendor's library plans it anew",
)
paged_attention.implementation(
    "torch",
    "reprise.ops.paged_attention.sdpa:paged_attention",
    requires=_needs_cpu_memory,
    graph_support="always",
)
paged_attention.implementation(
    "invariant",
    "reprise.ops.paged_attention.invariant:paged_attention",
    requires=_needs_cpu_memory,
    graph_support="always",
    batch_invariant=True,
)
paged_attention.implementation(
    "triton_invariant",
    "reprise.ops.paged_attention.absolute_splits_kernel:paged_attention",
    requires=needs_triton,
    graph_support="always",
    batch_invariant=True,
)
paged_attention.implementation(
    "cpp",
    "reprise.ops.paged_attention.cpp:paged_attention",
    requires=needs_compiler,
    graph_support="always",
)
