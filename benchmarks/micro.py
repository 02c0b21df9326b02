"""Sizes of launches: time and bits."""
import contextvars, math, os, sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
sys.path.insert(0, os.path.join(os.environ.get("TREE", "."), "benchmarks"))
from kernels import Bench
from reprise import platforms
from reprise.ops import OpTable
from reprise.ops.linear import shared_sums_kernel as K, triton as plain, triton_invariant as same
from reprise.ops.paged_attention import absolute_splits_kernel as A
import reprise.ops.paged_attention.cases
C = sys.modules["reprise.ops.paged_attention.cases"]
from reprise.ops.paged_attention.attend import Config as AC
from reprise.ops.cases import LARGE, SMALL
platform = platforms.resolve("cuda"); platform.activate()
bench = Bench(platform); make = bench.make
BF, dev = torch.bfloat16, platform.device
began = time.time()
def say(*a): print(f"{time.time()-began:6.1f}", *a, flush=True)
pool = ThreadPoolExecutor(14)
def warm(calls):
    def one(call):
        platform.activate()
        with torch.inference_mode(): call()
    list(pool.map(lambda c: c[0].run(one, c[1]), [(contextvars.copy_context(), c) for c in calls]))
    platform.synchronize()
EPS = 1e-6
# model, op, outputs, inputs
SHAPES = [("8B", "norm_linear", 6144, 4096), ("8B", "linear_add", 4096, 4096), ("8B", "norm_gated_linear", 24576, 4096), ("8B", "linear_add", 4096, 12288),
          ("0.6B", "norm_linear", 4096, 1024), ("0.6B", "linear_add", 1024, 2048), ("0.6B", "norm_gated_linear", 6144, 1024), ("0.6B", "linear_add", 1024, 3072)]
weights = {}
def weight(o, i):
    if (o, i) not in weights:
        n = min(24, math.ceil((200 << 20) / (2 * o * i)))
        weights[o, i] = [torch.randn(o, i, device=dev, dtype=BF) * i ** -0.5 for _ in range(n)]
    return weights[o, i]
def calls_of(module, op, o, i, rows):
    x = torch.randn(rows, i, device=dev, dtype=BF); g = torch.ones(i, device=dev, dtype=BF)
    f = getattr(module, op)
    if op == "linear_add":
        r = torch.zeros(rows, o, device=dev, dtype=BF)
        return [lambda w=w: f(x, w, None, r) for w in weight(o, i)]
    return [lambda w=w: f(x, g, EPS, w, None) for w in weight(o, i)]
def table(label, module, shapes, counts):
    todo = {(s, r): calls_of(module, s[1], s[2], s[3], r) for s in shapes for r in counts}
    try:
        warm([c[0] for c in todo.values()])
    except Exception as e:
        say(label, "FAILED", str(e)[:300]); return
    for s in shapes:
        line = []
        for r in counts:
            c = todo[s, r]
            line.append(f"{bench.seconds(c * max(1, 16 // len(c))) * 1e6:8.1f}")
        say(f"{label:34} {s[0]:5}{s[3]:6} to {s[2]:6}", *line)
def patched(**values):
    old = {n: getattr(K, n) for n in values}
    for n, v in values.items(): setattr(K, n, v)
    K.parts_of.cache_clear() if hasattr(K.parts_of, "cache_clear") else None
    getattr(K.config_of, "cache_clear", lambda: None)()
    return old
Cf = K.Config
with torch.inference_mode(), OpTable(platform).activate():
    say("copy, product", [round(x / 1e9) for x in bench.ceilings()])
    what = sys.argv[1:] or ["few", "attention", "many", "bits"]
    if "bits" in what:
        for o, i, gated in ((6144, 4096, 0), (24576, 4096, 1), (4096, 12288, 0), (1024, 3072, 0)):
            w = weight(o, i)[0]
            half = i // 2
            base = torch.randn(2048, half, device=dev, dtype=BF)
            order = torch.randperm(i, device=dev)
            x = torch.cat([base, -base], 1)[:, order].contiguous(); wc = torch.cat([w[:, :half]] * 2, 1)[:, order].contiguous()
            for name, xx, ww in (("normal", torch.randn(2048, i, device=dev, dtype=BF), w), ("cancelling", x, wc)):
                outs = {}
                for rows in (1, 8, 16, 32, 64, 128, 256, 512, 2048):
                    out = torch.empty(rows, o // 2 if gated else o, device=dev, dtype=torch.float32)
                    K.launch_product(xx[:rows], ww, None, out, gated=bool(gated))
                    outs[rows] = out
                ref = xx.float() @ ww.float().t()
                if gated: ref = torch.nn.functional.silu(ref[:, :o // 2]) * ref[:, o // 2:]
                err = ((outs[2048] - ref).norm() / ref.norm()).item() if name == "normal" else 0
                say("bits", (o, i), name, {r: bool(torch.equal(a, outs[2048][:r])) for r, a in outs.items()}, f"error {err:.1e}", f"{outs[2048].abs().max().item():.3g}")
    if "few" in what:
        few = (1, 8, 64)
        table("plain", plain, SHAPES, few)
        F = K._FEW
        for label, values in (
            ("aim 3", {}), ("aim 2", {"_PROGRAMS": 2}),
            ("aim 3, 8: k128 x6; 64: k128 x3", {"_FEW": (Cf(8, 64, 128, 6, 4, late=True), *F[1:3], Cf(64, 64, 128, 3, 4))}),
            ("aim 2, 8: k256 x2; 64: n128 x4", {"_PROGRAMS": 2, "_FEW": (Cf(8, 64, 256, 2, 4, late=True), *F[1:3], Cf(64, 128, 64, 4, 4))}),
        ):
            old = patched(**values); table(label, same, SHAPES, few); patched(**old)
    if "attention" in what:
        def case(model, lengths, new, query_len=None):
            a = C._workload(make, model, lengths, new, "", query_len=query_len).arguments()
            if max(lengths) <= 4096: a["block_tables"] = a["block_tables"][:, :256].contiguous()
            return a
        cases = {
            "8B 1x208": case(LARGE, [208], 1), "8B 8x208": case(LARGE, [208] * 8, 1), "8B 64x208": case(LARGE, [208] * 64, 1), "0.6B 1x208": case(SMALL, [208], 1), "0.6B 64x208": case(SMALL, [208] * 64, 1),
            "8B 1x2000": case(LARGE, [2000], 1), "8B 128x800": case(LARGE, [800] * 128, 1), "0.6B 256x800": case(SMALL, [800] * 256, 1),
            "0.6B 256 ragged": case(SMALL, [100 + 6 * n for n in range(256)], 1), "8B 1x32768": case(LARGE, [32768], 1),
            "8B 4x2048": case(LARGE, [2048] * 4, 2048, 0), "8B 8192": case(LARGE, [8192], 8192, 0),
            "8B 256x800 mixed": case(LARGE, [800] * 256, 1, 0),
        }
        from reprise.ops.paged_attention.triton import paged_attention as usual
        found, outs = {}, {}
        variants = {"plain": None, "256": {}, "512": {"SPLIT": 512}, "1024": {"SPLIT": 1024},
            "256, 128 rows": {"steady_config": lambda *a: AC(128, 64, 8, 3)},
            "512, 2 stages": {"SPLIT": 512, "steady_config": lambda *a: AC(64, 64, 4, 2)}}
        for v, values in variants.items():
            f = usual if values is None else A.paged_attention
            old = {n: getattr(A, n) for n in values or {}}
            for n, x in (values or {}).items(): setattr(A, n, x)
            try:
                warm([lambda a=a: f(**a) for a in cases.values()])
                for c, a in cases.items():
                    found[c, v] = bench.seconds([lambda: f(**a)] * 12) * 1e6
                    f(**a); outs[c, v] = a["out"].clone()
                    if values is not None and a["query_len"]:
                        f(**{**a, "query_len": 0})
                        if not torch.equal(a["out"], outs[c, v]): say("BITS differ between uniform and mixed", c, v)
                say("attention", v, {c: round(found[c, v], 1) for c in cases})
            except Exception as e:
                say("attention", v, "FAILED", str(e)[:300])
            for n, x in old.items(): setattr(A, n, x)
        for c in cases:
            r = outs[c, "plain"].float()
            say("agree", c, {v: f"{((outs[c, v].float() - r).norm() / r.norm()).item():.1e}" for v in variants if (c, v) in outs},
                "256 == 256, 128 rows:", (c, "256, 128 rows") in outs and torch.equal(outs[c, "256"], outs[c, "256, 128 rows"]))
    if "many" in what:
        counts = (128, 256, 2048)
        big = SHAPES[:4]
        table("plain", plain, big, counts)
        table("as chosen", same, big, counts)
        for label, cfg, one in (
            ("128x128 x4", Cf(128, 128, 64, 4, 8), 0), ("128x128 x4, one part", Cf(128, 128, 64, 4, 8), 1),
            ("256x128 x4, one part", Cf(256, 128, 64, 4, 8), 1),
            ("128x256 x4, one part", Cf(128, 256, 64, 4, 8), 1),
            ("128x64 x4", Cf(128, 64, 64, 4, 4), 0),
        ):
            values = {"config_of": lambda *a, cfg=cfg: cfg}
            if one: values["parts_of"] = lambda *a: 1
            old = patched(**values); table(label, same, big, counts); patched(**old)
