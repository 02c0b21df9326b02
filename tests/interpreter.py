"""Triton's interpreter, made several times as fast; what kernels compute is the same bit for bit.

The interpreter runs a kernel in Python, once for each program of a grid. Most of its time is not
arithmetic: each operator goes through Triton's language layer (which types meet, what is cast and
broadcast to what, what the result's type is), which then asks a *builder* for a few arrays. That
layer was written for a compiler. All that it knows of a tensor is its type: values are handles to
it, which it hands on. So what it asks of the builder depends on the types of tensors, and on other
arguments, alone. Here that is traced once for each set of these, with handles that nobody can look
into, and later calls ask the builder the same (:class:`Trace`, :class:`Quick`):

- A call is known by the function, by the type of each tensor (class, element type, address space,
  shape; scalar types by identity), and by class and value of all else. Arguments of other classes
  are never traced: such calls go through the language layer as ever.
- While tracing nothing is computed, so nothing is done twice if it fails. Whatever does not fit (an
  exception, a handle that is looked into, a function of the builder that is not listed here) leaves
  the call to the language layer for ever.
- ``bool(tensor)`` of one number is what the layer does ask of values. Both answers are traced, and
  must lead to the same.
- Pure functions of the builder, which depend on their arguments alone, are left out where nobody
  takes their result (checks for overflow, which fail only with the option ``debug``), and called
  once where all arguments are constants; such arrays are made read-only.

Beside this the language is patched once, and not for each launch and device function, and assigned
numbers are made tensors once. Functions of the builder are replaced by quicker ones where their
source is the one that these were written for (:data:`KNOWN`); those of other versions stay.
``tests/ops/test_interpreter.py`` compares both ways.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_GET = """
int1 int8 uint8 int16 uint16 int32 uint32 int64 uint64 fp16 bf16 fp32 fp64 null_value
all_ones_value
"""
_CREATE = """
si_to_fp ui_to_fp fp_to_si fp_to_ui fp_ext fp_trunc int_cast fp_to_fp bitcast int_to_ptr
ptr_to_int fadd fmul fdiv frem fsub fneg mul precise_divf sdiv udiv srem urem add sub shl lshr
ashr minsi minui minimumf minnumf maxsi maxui maximumf maxnumf icmpSLE icmpSLT icmpSGE icmpSGT
icmpULE icmpULT icmpUGE icmpUGT icmpEQ icmpNE fcmpOLT fcmpOGT fcmpOLE fcmpOGE fcmpOEQ fcmpONE
fcmpULT fcmpUGT fcmpULE fcmpUGE fcmpUEQ fcmpUNE and xor or umulhi clampf select fma fabs cos
exp exp2 iabs floor ceil log log2 precise_sqrt sqrt sin erf rsqrt reshape trans dot make_range
addptr expand_dims broadcast cat join splat unsplat gather
"""
PURE = frozenset(f"get_{each}" for each in _GET.split()) | frozenset(
    f"create_{each}" for each in _CREATE.split()
)
"""Functions of the builder whose result depends on their arguments alone."""
ACTS = frozenset((
    "create_get_program_id", "create_get_num_programs", "create_load", "create_store",
    "create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw",
    "create_barrier",
))  # fmt: skip
"""Those whose result depends on more, or that do more."""
MOST_PATHS = 8
MOST_PROGRAMS = 1 << 14
"""Of one function, to keep."""
CONSTANT_BYTES = 1 << 16
"""Of an array, to keep."""


KNOWN = {
    "_validate_np_data_size": {"5d719f1e7c0db91f"},
    "__post_init__": {"9483740c986a6ebf"},
    "binary_op": {"527fcf68522a463c", "c3f3cd8daf681ea3"},
}
"""Of what is replaced, digests of the source in Triton 3.6 and 3.9."""


class Untraceable(BaseException):
    """Not an ``Exception``: whoever catches those does not go on as if nothing were."""


# ---- how calls are told apart ------------------------------------------------------------------

_identities: dict[Any, object] = {}
_pinned: list[Any] = []


class _Identity:
    """``type._identity``: one object for all types that are the same. A type is never changed, so
    it keeps what was found when it was first asked."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        known: tuple[Any, ...]
        if type(instance) is tl.dtype:
            _pinned.append(instance)  # nobody else gets its id
            known = ("scalar", id(instance))
        elif type(instance) is tl.pointer_type:
            element = instance.element_ty._identity
            known = ("pointer", element, instance.address_space, instance.const)
        elif type(instance) is tl.block_type:
            known = ("block", instance.element_ty._identity, *map(int, instance.shape))
        else:
            raise Untraceable
        found = instance.__dict__["_identity"] = _identities.setdefault(known, object())
        return found


def _describe(value: Any, key: list[Any], tensors: list[Any]) -> None:
    """Add to the key what the language layer may look at, and to ``tensors`` what it may not."""
    kind = value.__class__
    if kind is tl.tensor:
        key.append(value.type._identity)
        tensors.append(value)
    elif kind is int or kind is bool or kind is str or kind is tl.PropagateNan:
        key += (kind, value)
    elif value is None:
        key.append(None)
    elif kind is float:
        if value != value:
            raise Untraceable
        key += (float, value, math.copysign(1.0, value))
    elif isinstance(value, tl.dtype):
        key += (tl.dtype, value._identity)
    elif kind is tl.constexpr:
        key.append(kind)
        _describe(value.value, key, tensors)
    elif kind is tuple or kind is list:
        key += (kind, len(value))
        for each in value:
            _describe(each, key, tensors)
    elif kind is tl.tuple and value.type.fields is None:
        key += (kind, len(value.values))
        for each in value.values:
            _describe(each, key, tensors)
    elif kind is slice:
        key.append(kind)
        for each in (value.start, value.stop, value.step):
            _describe(each, key, tensors)
    else:
        raise Untraceable


def _with_others(value: Any, others: Iterator[Any]) -> Any:
    """An argument with these tensors for its own, in the order of :func:`_describe`."""
    kind = value.__class__
    if kind is tl.tensor:
        return next(others)
    if kind is tuple or kind is list:
        return kind(_with_others(each, others) for each in value)
    if kind is tl.tuple:
        return tl.tuple([_with_others(each, others) for each in value.values])
    return value


# ---- tracing -----------------------------------------------------------------------------------


class Handle:
    """What the language layer has of a tensor while it is traced."""

    __slots__ = ("place", "trace")

    def __init__(self, trace: Trace, place: int) -> None:
        self.trace, self.place = trace, place

    def __getattr__(self, name: str) -> Any:
        raise Untraceable


class Trace:
    """What a call asks of the builder; it is the builder meanwhile.

    Args:
        inputs: Number of tensors among the arguments.
        answers: To questions whether a tensor of one number is true, in order; any more are
            answered with yes, and added.
    """

    def __init__(self, inputs: int, answers: list[bool]) -> None:
        self.inputs = inputs
        self.steps: list[tuple[str, tuple[Any, ...]]] = []
        """Function of the builder, and its arguments: ("handle", place) or (class, value). The
        result of the first step has the place behind the inputs', and so on."""
        self._answers, self._asked = answers, 0
        self._values: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("options", "codegen_fns", "arch") or name == "get_cache_policy":
            return getattr(interpreter.interpreter_builder, name)
        if name.startswith("get_") and name.endswith("_ty"):
            return getattr(interpreter.interpreter_builder, name)
        if name in PURE or name in ACTS:
            return functools.partial(self._add, name)
        raise Untraceable

    def _add(self, name: str, *args: Any) -> Handle:
        self.steps.append((name, tuple(map(self._argument, args))))
        return Handle(self, self.inputs + len(self.steps) - 1)

    def _argument(self, value: Any) -> tuple[Any, Any]:
        if value.__class__ is Handle:
            if value.trace is not self:
                raise Untraceable
            return "handle", value.place
        if isinstance(value, interpreter.TensorHandle):
            raise Untraceable
        if isinstance(value, (list, tuple, tl.tuple)):
            if any(isinstance(each, (Handle, interpreter.TensorHandle)) for each in value):
                raise Untraceable
            if isinstance(value, list):
                value = list(value)
        return value.__class__, value

    def value(self, place: int) -> Any:
        """A handle for what depends on nothing, else None."""
        if place < self.inputs:
            return None
        if place not in self._values:
            self._values[place] = self._computed(*self.steps[place - self.inputs])
        return self._values[place]

    def _computed(self, name: str, args: tuple[Any, ...]) -> Any:
        if name not in PURE:
            return None
        if any(kind == "handle" and self.value(each) is None for kind, each in args):
            return None
        values = [self.value(each) if kind == "handle" else each for kind, each in args]
        found = getattr(interpreter.interpreter_builder, name)(*values)
        if found.data.nbytes > CONSTANT_BYTES:
            return None
        found.data.flags.writeable = False
        return found

    def truth(self, tensor: Any) -> bool:
        """As ``bool(tensor)`` is of a tensor like this one."""
        if tensor.type.is_block() and math.prod(map(int, tensor.type.shape)) != 1:
            return True
        known = self.value(tensor.handle.place)
        if known is not None:
            return bool(known.data)
        if self._asked == len(self._answers):
            self._answers.append(True)
        self._asked += 1
        return self._answers[self._asked - 1]


def _traced(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Any],
) -> Callable[..., Any]:  # fmt: skip
    """What does to tensors of these types what ``function`` does.

    Raises:
        Untraceable: Or whatever the language layer raises.
    """
    answers: list[bool] = []
    first: tuple[Trace, Any] | None = None
    for _ in range(MOST_PATHS):
        trace = Trace(len(tensors), answers)
        stand_ins = [tl.tensor(Handle(trace, n), each.type) for n, each in enumerate(tensors)]
        others = iter(stand_ins)
        new_args = [_with_others(each, others) for each in args]
        new_kwargs = {name: _with_others(each, others) for name, each in kwargs.items()}
        result = function(*new_args, **new_kwargs, _semantic=type(_semantic)(trace))
        described = _result(result, trace, tensors)
        if first is None:
            first = trace, described
        elif (trace.steps, described) != (first[0].steps, first[1]):
            raise Untraceable
        del answers[trace._asked :]
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            return _program(first[0], first[1])
        answers[-1] = False
    raise Untraceable


def _result(value: Any, trace: Trace, tensors: list[Any]) -> tuple[Any, ...]:
    """What the language layer returns: ("given", argument), ("tensor", place, identity, type), a
    tuple or list of such, or a constant."""
    kind = value.__class__
    if kind is tl.tensor:
        if value.handle.__class__ is not Handle or value.handle.trace is not trace:
            raise Untraceable
        place = value.handle.place
        if place < trace.inputs and _same_type(value.type, tensors[place].type):
            return "given", place
        return "tensor", place, _Typed(value.type)
    if kind is tuple or kind is list:
        return (kind.__name__, *(_result(each, trace, tensors) for each in value))
    if value is None:
        return ("constant",)
    raise Untraceable


def _same_type(one: Any, other: Any) -> bool:
    return one is other or one._identity is other._identity


class _Typed:
    """A type, equal to those that are the same."""

    __slots__ = ("type",)

    def __init__(self, type: Any) -> None:
        self.type = type

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Typed) and _same_type(self.type, other.type)

    __hash__ = None  # type: ignore[assignment]


# ---- doing it again ----------------------------------------------------------------------------


def _program(trace: Trace, result: tuple[Any, ...]) -> Callable[..., Any]:
    """A function of the tensors: asks the builder for what is needed, and returns what was."""
    inputs, needed = trace.inputs, set(_places(result))
    for number in reversed(range(len(trace.steps))):
        name, args = trace.steps[number]
        if name not in ACTS and inputs + number not in needed:
            continue
        needed.add(inputs + number)
        if trace.value(inputs + number) is None:
            needed.update(each for kind, each in args if kind == "handle")
    lines: list[str] = []
    constants: list[Any] = []

    def constant(value: Any) -> str:
        constants.append(value)
        return f"c{len(constants) - 1}"

    def handle(place: int) -> str:
        value = trace.value(place)
        if value is not None:
            return constant(value)
        return f"t{place}.handle" if place < inputs else f"h{place}"

    for number, (name, args) in enumerate(trace.steps):
        place = inputs + number
        if place not in needed or trace.value(place) is not None:
            continue
        given = [handle(each) if kind == "handle" else constant(each) for kind, each in args]
        lines.append(f"h{place} = builder.{name}({', '.join(given)})")

    def returned(result: tuple[Any, ...]) -> str:
        kind, *rest = result
        if kind == "given":
            return f"t{rest[0]}"
        if kind == "constant":
            return "None"
        if kind == "tensor":
            name = f"r{len(lines)}"
            lines.append(f"{name} = new(Tensor)")
            alike = tl.tensor(None, rest[1].type)
            for attribute, value in vars(alike).items():
                given = handle(rest[0]) if attribute == "handle" else constant(value)
                lines.append(f"{name}.{attribute} = {given}")
            return name
        items = "".join(f"{returned(each)}, " for each in rest)
        return f"({items})" if kind == "tuple" else f"[{items}]"

    lines.append(f"return {returned(result)}")
    arguments = ", ".join(f"t{n}" for n in range(inputs))
    names = ", ".join(f"c{n}" for n in range(len(constants)))
    body = textwrap.indent("\n".join(lines), " ")
    source = f"def program({arguments}):\n{body}\nreturn program"
    made = _made(f"def make({names}):\n{textwrap.indent(source, ' ')}")
    program: Callable[..., Any] = made(*constants)
    return program


def _places(result: tuple[Any, ...]) -> Iterator[int]:
    kind, *rest = result
    if kind == "tensor":
        yield rest[0]
    elif kind in ("tuple", "list"):
        for each in rest:
            yield from _places(each)


@functools.cache
def _made(source: str) -> Any:
    """Programs of one form differ in their constants."""
    names: dict[str, Any] = {
        "builder": interpreter.interpreter_builder, "new": object.__new__, "Tensor": tl.tensor,
    }  # fmt: skip
    exec(source, names)
    return names["make"]


_semantic = interpreter.interpreter_semantic
_tracing = threading.Lock()
_once = object()


class Quick:
    """Makes a function of the language one that runs in the interpreter.

    Args:
        function: As the language has it: takes ``_semantic``.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._programs: dict[tuple[Any, ...], Any] = {}
        """By what calls are told apart: a program, None where there can be none, or that there
        was a call."""

    def member(self) -> Callable[..., Any]:
        """To be put into the language; a plain function, so that it can be a method."""
        function, look_up, unseen = self._function, self._programs.get, self._unseen
        tensor, describe = tl.tensor, _describe

        def quick(*args: Any, **kwargs: Any) -> Any:
            key: list[Any] = []
            tensors: list[Any] = []
            if kwargs:
                semantic = kwargs.pop("_semantic", None)
                if semantic is not None and semantic.builder.__class__ is Trace:
                    return function(*args, **kwargs, _semantic=semantic)
            try:
                for each in args:
                    kind = each.__class__
                    if kind is tensor:
                        key.append(each.type._identity)
                        tensors.append(each)
                    elif kind is int:
                        key += (int, each)
                    else:
                        describe(each, key, tensors)
                for name, each in kwargs.items():
                    key.append(name)
                    describe(each, key, tensors)
            except Untraceable:
                return function(*args, **kwargs, _semantic=_semantic)
            known = tuple(key)
            program = look_up(known, unseen)
            if program.__class__ is _function_class:
                return program(*tensors)
            return self._call(known, program, args, kwargs, tensors)

        return quick

    _unseen = object()

    def _call(
        self, key: tuple[Any, ...], program: Any, args: Any, kwargs: Any, tensors: list[Any]
    ) -> Any:
        if program is self._unseen:
            if len(self._programs) >= MOST_PROGRAMS:
                self._programs.clear()
            self._programs[key] = _once
        elif program is _once and _tracing.acquire(blocking=False):
            found = None
            try:
                found = _traced(self._function, args, kwargs, tensors)
            except (Untraceable, Exception):
                pass
            finally:
                _tracing.release()
            self._programs[key] = found
            if found is not None:
                return found(*tensors)
        return self._function(*args, **kwargs, _semantic=_semantic)


_function_class = type(lambda: None)


# ---- putting it in -----------------------------------------------------------------------------


@functools.cache
def _quick(function: Callable[..., Any]) -> Callable[..., Any]:
    return Quick(function).member()


class _Patches:
    """Attributes that have others, until they are put back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self.language: Any = None
        """What the language's own patches are put back by."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, vars(owner).get(name, self)))
        setattr(owner, name, value)

    def restore(self) -> None:
        while self._before:
            owner, name, value = self._before.pop()
            if value is self:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        if self.language is not None:
            self.language.restore()
            self.language = None


_patches = _Patches()


class _Widest:
    """``type._widest``: bytes that an element of an array for it may have, as in
    ``_validate_np_data_size``. Found once, as by :class:`_Identity`."""

    def __get__(self, instance: Any, owner: Any) -> int:
        bits = 1 << 30 if isinstance(instance, tl.pointer_type) else instance.primitive_bitwidth
        found = instance.__dict__["_widest"] = max(bits, 8) // 8
        return found


def known(function: Callable[..., Any]) -> bool:
    """Whether its source is the one that what replaces it was written for."""
    source = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16] in KNOWN[function.__name__]


def _replace_builder() -> None:
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    checked, operated = handle.__post_init__, builder.binary_op
    if not (known(interpreter._validate_np_data_size) and known(checked) and known(operated)):
        return
    truths = np.dtype(bool)

    def check(self: Any) -> None:
        if self.data.itemsize > self.dtype._widest:
            checked(self)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        one, other = lhs.data, rhs.data
        if one.dtype is truths and other.dtype is truths:
            return operated(self, lhs, rhs, op)
        dtype = lhs.dtype.scalar
        output = op(one, other)
        if output.itemsize > dtype._widest:
            output = output.astype(interpreter._get_np_dtype(dtype))
        return handle(output, dtype)

    _patches.set(tl.dtype, "_widest", _Widest())
    _patches.set(handle, "__post_init__", check)
    _patches.set(builder, "binary_op", binary_op)


def quicken() -> None:
    """From now on, in this process."""
    put, numbers_of = interpreter._patch_lang, interpreter._get_np_dtype
    seen: set[int] = set()
    numbers: dict[str, Any] = {}

    def patched_once(function: Any) -> Any:
        if id(function.__globals__) not in seen:
            known = map(id, function.__globals__.values())
            seen_here = not {id(tl), id(tl.core)}.isdisjoint(known)
            assert seen_here, "triton.language must be visible from within jit'd function"
            if not seen:
                _patch_language(put)
            seen.add(id(function.__globals__))
            _pinned.append(function.__globals__)
        return interpreter._LangPatchScope()

    def patched(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        scope.set_attr(owner, name, _quick(member))

    def looked_up_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numbers:
            numbers[name] = numbers_of(dtype)
        return numbers[name]

    _patches.set(interpreter, "_patch_attr", patched)
    _patches.set(interpreter, "_patch_lang", patched_once)
    _patches.set(interpreter, "_get_np_dtype", looked_up_once)
    _patches.set(tl.dtype, "_identity", _Identity())
    _replace_builder()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within the ``with`` block the interpreter is as Triton has it, but for that it patches the
    language once: what it does for a device function is never undone."""
    _patches.restore()
    scope = _patch_everything(interpreter._patch_lang)
    _patches.set(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    try:
        yield
    finally:
        _patches.restore()
        scope.restore()
        quicken()


def _patch_everything(put: Callable[..., Any]) -> Any:
    """Whichever module of the language a kernel sees. What it is undone by."""
    modules = {"tl": tl, "core": tl.core}
    scope = put(types.FunctionType((lambda: None).__code__, modules))
    # NumPy 2.5 makes no number of an array that Triton up to 3.6 has not made one of.
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
    return scope


def _patch_language(put: Callable[..., Any]) -> None:
    _patches.language = _patch_everything(put)
    truth, made_tensor = tl.tensor.__bool__, _semantic.to_tensor
    constants: dict[tuple[Any, Any], Any] = {}

    def traced_truth(self: Any) -> bool:
        if self.handle.__class__ is Handle:
            found: bool = self.handle.trace.truth(self)
            return found
        return bool(truth(self))

    def to_tensor(value: Any, check_type: bool = True) -> Any:
        """Of each value that a kernel assigns."""
        kind = value.__class__
        if kind is tl.tensor:
            return value
        if kind is not int and kind is not bool:
            return made_tensor(value, check_type)
        found = constants.get((kind, value))
        if found is None:
            found = made_tensor(value, check_type)
            found.handle.data.flags.writeable = False
            if len(constants) < MOST_PROGRAMS:
                constants[kind, value] = found
        return found

    _patches.set(tl.tensor, "__bool__", traced_truth)
    _patches.set(_semantic, "to_tensor", to_tensor)
