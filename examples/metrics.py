"""What the engine counts."""

import sys

from reprise import LLM, SamplingParams
from reprise.metrics import Counter, Gauge, Histogram, Vector

PROMPTS = ["Once upon a time", "47 + 38 =", "Once upon a time, in the forest,", "9 + 80 ="]


def main(model: str | None = None) -> None:
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=20)
    llm = LLM(model=model, disable_log_stats=False)
    for output in llm.generate(PROMPTS, sampling_params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

    for metric in llm.get_metrics():
        if isinstance(metric, Gauge):
            print(f"{metric.name} (gauge) = {metric.value}")
        elif isinstance(metric, Counter):
            print(f"{metric.name} (counter) = {metric.value}")
        elif isinstance(metric, Vector):
            print(f"{metric.name} (vector) = {metric.values}")
        elif isinstance(metric, Histogram):
            print(f"{metric.name} (histogram)")
            print(f"    sum = {metric.sum}")
            print(f"    count = {metric.count}")
            for bucket_le, value in metric.buckets.items():
                print(f"    {bucket_le} = {value}")


if __name__ == "__main__":
    main(*sys.argv[1:])
