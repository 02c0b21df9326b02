"""Device graphs for the CPU: the dispatched ops are recorded and run again on the same memory.

The semantics are those of an accelerator's graphs, so that the whole graph stack is tested
without one: addresses are fixed, host scalars are baked in, Python does not run again, and reading
a tensor's value on the host during capture is refused. One difference: ops do run at capture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_map_only

from reprise.errors import GraphError
from reprise.platforms.borrow import storage_key
from reprise.platforms.device_graph import DeviceGraph, Recorder, state
from reprise.platforms.recorded_pool import RecordedPool

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_HOST_READS = frozenset({"aten::resolve_conj", "aten::resolve_neg"})
"""What ``Tensor.tolist()`` and ``.numpy()`` show of themselves when the memory is the host's."""
_SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
_UNINITIALISED = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """The CPU's capture stream: graphs may begin and end inside, also in the midst of an op."""
    if state.recorder is not None:
        yield state.recorder
        return
    recorder = state.recorder = OpRecorder()
    try:
        # Only in inference mode do all calls reach the dispatcher before they are taken apart.
        with torch.inference_mode(), recorder:
            yield recorder
    finally:
        state.recorder = None
        if isinstance(state.graph, RecordedGraph):
            state.graph.abort()


class RecordedGraph(DeviceGraph):
    """Calls with fixed arguments. Intermediates lie in the pool, all else where it was."""

    computes_while_captured = True

    def __init__(self, pool: RecordedPool) -> None:
        super().__init__(pool)
        self.pool: RecordedPool = pool
        self._calls: list[Callable[[], Any]] = []
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        """Number of calls that a replay makes."""
        return len(self._calls)

    def may_own(self, tensor: Tensor) -> bool:
        return self.pool.holds(tensor)

    def _stream(self) -> contextlib.AbstractContextManager[Any]:
        return recording()

    def _begin(self) -> None:
        if state.recorder is None:
            raise GraphError("begin() outside of the platform's capture_stream()")
        self._nbytes = -self.pool.nbytes

    def _end(self) -> None:
        self._nbytes += self.pool.nbytes
        self.empty = not self._calls

    def _replay(self) -> None:
        with torch.inference_mode():
            for call in self._calls:
                call()

    def record(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        *,
        writes: bool,
    ) -> Any:
        """Add a call that has just been made; return its result, with new tensors in the pool.

        Args:
            writes: The call may write into its arguments.
        """
        given = {storage_key(each) for each in _tensors((args, kwargs))}
        leaves, structure = ([result], None) if isinstance(result, Tensor) else tree_flatten(result)
        fresh = [
            each for each in leaves if isinstance(each, Tensor) and storage_key(each) not in given
        ]
        if not fresh:
            if writes:
                self._calls.append(self._call(function, args, kwargs))
            return result
        moved = self._move(fresh)
        if not _leaves_uninitialised(function):
            _refuse_shared_elements(function, fresh)
            self._add_filling(function, args, kwargs, leaves, fresh, moved)
        by_identity = {id(old): new for old, new in zip(fresh, moved, strict=True)}
        results = [by_identity.get(id(each), each) for each in leaves]
        return results[0] if structure is None else structure.unflatten(results)

    def _add_filling(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        fresh: list[Tensor],
        moved: list[Tensor],
    ) -> None:
        """Add a call that fills ``moved``, the pool's copies of the ``fresh`` tensors."""
        targets = [self._keep(each) for each in moved]
        call = self._call(function, args, kwargs)
        if len(leaves) == 1:
            into = _out_variant(function)
            if into is not None and moved[0].untyped_storage().nbytes() == moved[0].nbytes:
                call = functools.partial(into, *call.args, **call.keywords, out=targets[0])
                self._calls.append(call)
                return
        new = {id(each) for each in fresh}
        positions = [index for index, each in enumerate(leaves) if id(each) in new]

        def compute_and_copy() -> None:
            result = call()
            results = [result] if isinstance(result, Tensor) else tree_flatten(result)[0]
            for position, target in zip(positions, targets, strict=True):
                target.copy_(results[position])

        self._calls.append(compute_and_copy)

    def _move(self, fresh: list[Tensor]) -> list[Tensor]:
        """Copies of the tensors in the pool, with the same layout and sharing of storages."""
        storages: dict[int, torch.UntypedStorage] = {}
        moved = []
        for each in fresh:
            key, storage = storage_key(each), each.untyped_storage()
            first = key not in storages
            if first:
                storages[key] = self.pool.storage(storage.nbytes())
            layout = (each.storage_offset(), each.size(), each.stride())
            copy = torch.empty(0, dtype=each.dtype).set_(storages[key], *layout)
            if first and each.nbytes == storage.nbytes() and each.is_contiguous():
                copy.copy_(each)  # a fraction of the time that it takes of a storage
            elif first:
                storages[key].copy_(storage)
            moved.append(copy)
        return moved

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> functools.partial[Any]:
        return functools.partial(function, *self._keep(args), **self._keep(kwargs))

    def _keep(self, tree: Any) -> Any:
        """``tree`` with tensors that do not hold on to the pool's blocks."""

        def keep(tensor: Tensor) -> Tensor:
            resident = self.pool.resident(tensor)
            return tensor if resident is None else resident

        return _map_tensors(keep, tree)


class _Frame:
    """One op that is being handled: what it launched, and whether its inside was recorded."""

    def __init__(self) -> None:
        self.work: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None
        self.expanded = False


class OpRecorder(TorchDispatchMode):
    """Hands the ops of this thread to the graph that is being captured, if any."""

    def __init__(self) -> None:
        super().__init__()
        self._frames: list[_Frame | None] = [None]
        """The op in whose kernel we are; None at the top: host code."""
        self._composites = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled functions run as compiled, and are recorded whole by their ``launch``."""
        return True

    @property
    def in_kernel(self) -> bool:
        return self._frames[-1] is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        graph = state.graph
        if self.in_kernel or not isinstance(graph, RecordedGraph):
            return func(*args, **kwargs)
        may_read, composite = _known_of(func)
        if may_read:
            _refuse_host_read(func, args, kwargs)
        if composite:
            return self._take_apart(func, args, kwargs)
        frame = _Frame()
        self._frames.append(frame)
        try:
            result = func(*args, **kwargs)
        finally:
            self._frames.pop()
        if frame.expanded or state.graph is not graph:
            return result
        function, args, kwargs = frame.work or (func, args, kwargs)
        return graph.record(function, args, kwargs, result, writes=func._schema.is_mutable)

    def _take_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a composite op so that the ops it is made of are recorded."""
        if func.name() in _HOST_READS and not self._composites:
            raise GraphError(
                "Tensor.tolist() or .numpy() reads a device value on the host during capture"
            )
        self._composites += 1
        try:
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        finally:
            self._composites -= 1

    def launch(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See :func:`reprise.platforms.device_graph.launch`."""
        graph, frame = state.graph, self._frames[-1]
        if frame is not None:
            if frame.work is None:
                frame.work = (function, args, kwargs)
            return function(*args, **kwargs)
        with self._kernel() as frame, self._looking_away():
            result = function(*args, **kwargs)
            if frame.expanded or not isinstance(graph, RecordedGraph) or state.graph is not graph:
                return result
            return graph.record(function, args, kwargs, result, writes=True)

    @contextlib.contextmanager
    def host_code(self) -> Iterator[None]:
        """See :func:`reprise.platforms.device_graph.host_code`."""
        frame = self._frames[-1]
        if frame is None:
            yield
            return
        frame.expanded = True
        self._frames.append(None)
        try:
            with self:
                yield
        finally:
            self._frames.pop()

    def _looking_away(self) -> contextlib.AbstractContextManager[Any]:
        """Within a kernel, of which no call of torch is recorded by itself, none comes here: that
        would take ten times as long as the call."""
        modes = torch._C._len_torch_dispatch_stack()
        if modes and torch._C._get_dispatch_stack_at(modes - 1) is self:
            return _pop_mode_temporarily()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _kernel(self) -> Iterator[_Frame]:
        frame = _Frame()
        self._frames.append(frame)
        try:
            yield frame
        finally:
            self._frames.pop()


@functools.cache
def _known_of(func: Any) -> tuple[bool, bool]:
    """Whether it may read a value on the host, and whether it is made of other ops."""
    reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    may_read = bool(reads) or func.name() == "aten::repeat_interleave.Tensor"
    return may_read, torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


def _refuse_host_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tags = func.tags
    if torch.Tag.data_dependent_output in tags:
        raise GraphError(f"{func} reads a device value on the host during capture")
    if torch.Tag.dynamic_output_shape in tags and not _indexes_by_number(func, args):
        raise GraphError(f"{func} has a shape that depends on device values")
    if func.name() == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
        raise GraphError(f"{func} without output_size has a shape that depends on device values")


def _indexes_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """``x[i]`` has a known shape unless ``i`` is a mask."""
    if func.name() != "aten::index.Tensor":
        return False
    masks = (torch.bool, torch.uint8)
    return all(each is None or each.dtype not in masks for each in args[1])


def _refuse_shared_elements(function: Any, results: list[Tensor]) -> None:
    """A replay could not write such a result."""
    for each in results:
        if any(size > 1 and not step for size, step in zip(each.shape, each.stride(), strict=True)):
            raise GraphError(
                f"{getattr(function, '__name__', function)} returns an expanded tensor "
                f"{[*each.shape]}, of which several elements are one in memory: return a tensor "
                "with memory for each, as contiguous() makes it"
            )


def _leaves_uninitialised(function: Any) -> bool:
    name = getattr(function, "_schema", None)
    return name is not None and name.name.removeprefix("aten::") in _UNINITIALISED


def _map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """What torch's ``tree_map_only`` gives. Arguments of ops are mostly plain containers, for which
    this takes a tenth of the time."""
    if isinstance(tree, Tensor):
        return change(tree)
    kind = type(tree)
    if kind in _SCALARS:
        return tree
    if kind is tuple or kind is list:
        return kind([_map_tensors(change, each) for each in tree])
    if kind is dict:
        return {key: _map_tensors(change, each) for key, each in tree.items()}
    return tree_map_only(Tensor, change, tree)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(keep, tree)
    for each in found:
        if each.device.type != "cpu" or each.layout != torch.strided:
            raise GraphError(
                f"a recorded graph takes dense CPU tensors, not {each.layout} on {each.device}"
            )
    return found


@functools.lru_cache(maxsize=1024)
def _out_variant(function: Any) -> Any:
    """The overload with ``out=`` that computes straight into it on the CPU, or None."""
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        return None
    wanted = [(each.name, str(each.type)) for each in schema.arguments]
    for name in function.overloadpacket.overloads():
        candidate = getattr(function.overloadpacket, name)
        outs = [each for each in candidate._schema.arguments if each.is_out]
        rest = [(e.name, str(e.type)) for e in candidate._schema.arguments if not e.is_out]
        if (
            [each.name for each in outs] == ["out"]
            and rest == wanted
            and torch._C._dispatch_has_kernel_for_dispatch_key(candidate.name(), "CPU")
        ):
            return candidate
    return None
