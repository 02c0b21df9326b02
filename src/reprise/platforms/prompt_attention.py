"""Causal attention of a whole prompt by a vendor's kernel."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from reprise.platforms.base import PromptAttention


def heads_first(rows: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return rows.transpose(0, 1).unsqueeze(0)


def by_torch(backend: SDPBackend) -> PromptAttention:
    """Compute with this backend of torch's scaled dot product attention."""
    return functools.partial(_by_torch, backend)


def _by_torch(
    backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float
) -> None:
    with sdpa_kernel(backend):
        attended = F.scaled_dot_product_attention(
            heads_first(query), heads_first(keys), heads_first(values),
            is_causal=True, scale=scale, enable_gqa=True,
        )  # fmt: skip
    out.copy_(attended[0].transpose(0, 1))


MOST_PLANS = 256
"""Sizes to remember the plans of."""


class CudnnGraphs:
    """cuDNN's attention by a graph of its own, which writes where it is told to.

    To copy what torch's call of the same kernel gives takes a twenty-fifth of the kernel's time.
    The package ``nvidia-cudnn-frontend`` has to be installed. A plan is made for each size, which
    takes some 50 ms, and 0.9 s for the first of a process.

    Raises:
        ImportError: The package is missing; another error if it is there and does not import.
    """

    def __init__(self) -> None:
        import cudnn

        self._cudnn: Any = cudnn
        self._of_thread = threading.local()

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float
    ) -> None:
        """See :data:`reprise.platforms.base.PromptAttention`."""
        tensors = [heads_first(each) for each in (query, keys, values, out)]
        here = self._of_thread
        if not hasattr(here, "plans"):
            here.handles, here.plans = {}, {}
        handle = here.handles.get(query.device)
        if handle is None:
            handle = here.handles[query.device] = self._cudnn.create_handle()
        self._cudnn.set_stream(handle, torch.cuda.current_stream(query.device).cuda_stream)
        shapes = tuple((each.shape, each.stride(), each.dtype) for each in tensors)
        key = (query.device, scale, shapes)
        graph = here.plans.get(key)
        if graph is None:
            if len(here.plans) >= MOST_PLANS:
                here.plans.clear()
            graph = here.plans[key] = self._plan(tensors, scale, handle)
        size = max(1, graph.get_workspace_size())
        workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        graph.execute(dict(enumerate(tensors, 1)), workspace, handle=handle)

    def _plan(self, tensors: list[Tensor], scale: float, handle: Any) -> Any:
        kinds = self._cudnn.data_type
        dtype = kinds.BFLOAT16 if tensors[0].dtype is torch.bfloat16 else kinds.HALF
        graph = self._cudnn.pygraph(
            io_data_type=dtype,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=handle,
        )

        def described(number: int) -> Any:
            of = tensors[number - 1]
            found = graph.tensor(
                name=f"{number}", dim=list(of.shape), stride=list(of.stride()), data_type=dtype
            )
            found.set_uid(number)
            return found

        query, keys, values = (described(number) for number in (1, 2, 3))
        result, _ = graph.sdpa(
            name="attention", q=query, k=keys, v=values,
            is_inference=True, attn_scale=scale, use_causal_mask=True,
        )  # fmt: skip
        out = tensors[3]
        result.set_uid(4).set_output(True).set_dim(list(out.shape))
        result.set_stride(list(out.stride())).set_data_type(dtype)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self._cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph
