"""Steps and throughput with and without the same bits."""
import gc, json, sys, time, statistics
import torch
from reprise.llm import LLM
from reprise.bench.presets import engine_arguments, ThroughputWork
from reprise.bench.drive import run, random_prompts
from reprise.bench.throughput import lengths
what = sys.argv[1].split(",")
quick = "quick" in sys.argv
for model in what:
    found = {}
    for invariant in (False, True):
        began = time.time()
        options = {"dtype": "bfloat16", "max_model_len": 4096, "batch_invariant": invariant}
        engine = LLM(**engine_arguments(model, options)).engine
        start = time.time() - began
        row = {}
        for batch in (1, 8, 64):
            short, long = (32, 288) if batch == 1 else (16, 144)
            prompts = random_prompts([128] * batch, engine.vocab_size, 0)
            timed = lambda n: run(engine, prompts, [n] * batch)
            timed(long)
            pairs = [(timed(short), timed(long)) for _ in range(2)]
            row[f"bs{batch}"] = min((b.seconds - a.seconds) / (b.steps - a.steps) for a, b in pairs) * 1e3
            row[f"first{batch}"] = min(timed(1).seconds for _ in range(2)) * 1e3
        if not quick:
            inputs, outputs = lengths(ThroughputWork(), 0)
            prompts = random_prompts(inputs, engine.vocab_size, 0)
            run(engine, prompts, [min(each, 8) for each in outputs])
            row["throughput_s"] = run(engine, prompts, outputs).seconds
        found[invariant] = row
        print(model, "invariant" if invariant else "plain", f"start {start:.1f} s", {k: round(v, 3) for k, v in row.items()}, flush=True)
        del engine
        gc.collect(); torch.cuda.empty_cache()
    print(model, "RATIO", {k: round(found[True][k] / found[False][k], 3) for k in found[True]}, flush=True)
