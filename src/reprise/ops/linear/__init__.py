import torch

from reprise.ops.linear.reference import fake, reference
from reprise.ops.registry import op
from reprise.platforms import Platform


def _needs_onednn(platform: Platform) -> str | None:
    if platform.device.type != "cpu":
        return "oneDNN computes on the CPU"
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


linear = op("linear", reference, fake=fake)
linear.implementation("onednn", "reprise.ops.linear.onednn:linear", requires=_needs_onednn)
