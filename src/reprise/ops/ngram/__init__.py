from reprise.ops.ngram.cases import cases
from reprise.ops.ngram.reference import reference
from reprise.ops.registry import needs_triton, op

ngram = op("ngram", reference, cases=cases, mutates=("numbers", "tokens"), batch_invariant=True)
ngram.implementation(
    "triton", "reprise.ops.ngram.triton:ngram", requires=needs_triton, batch_invariant=True
)
