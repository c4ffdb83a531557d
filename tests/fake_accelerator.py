"""A GPU that does not exist: CPU tensors that claim to be on cuda:0, to check placement on machines without one.

Inside `fake_accelerator()` everything requested on "cuda" is computed on the CPU, to the same bits, by tensors of the
class OnAccelerator. An operation on tensors of two devices, which a GPU would refuse, is recorded with the line it
comes from and then computed anyway, so that one run finds all of them. It also records what the host waits for:
results that it reads (syncs), and copies to the GPU (uploads; PyTorch waits for those from pageable memory, too).

It patches torch in many places, and libraries cache what they find out about devices: use it in a separate process.
"""

import contextlib
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MEMORY_BYTES = 16 * 2**30
ROOT, TORCH = Path(__file__).parents[1], Path(torch.__file__).parent

# The host needs the result of these, or its size.
WAITING = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",  # unless it is told the size
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Besides the pointwise operations: those that accept a 0-dimensional CPU tensor as if it were a number.
TAKING_NUMBERS = {"fill", "fill_", "index_fill", "index_fill_", "masked_fill", "masked_fill_", "where"}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
MOVING = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.type_as}


@dataclass
class Record:
    """What happened on the accelerator: counts of (operation, place in the code)."""

    mismatches: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)
    uploads: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        """The totals, and under each a line for every operation and place, the most frequent first."""
        lines = []
        for title, events in vars(self).items():
            lines.append(f"{title}: {events.total()}")
            lines += [f"{count:8} {operation}  {place}" for (operation, place), count in events.most_common()]
        return "\n".join(lines)


class OnAccelerator(torch.Tensor):
    """A tensor that claims to be on cuda:0. `content` is the CPU tensor that it stands for.

    To C++ code, which knows no other device in a CPU build, it is on the CPU; what would show that is overridden.
    """

    content: torch.Tensor

    @staticmethod
    def __new__(cls, content: torch.Tensor) -> "OnAccelerator":
        layout = {"strides": content.stride(), "storage_offset": content.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, content.size(), **layout, dtype=content.dtype, device=CPU)
        tensor.content = content
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # the modes below decide on everything

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the fake accelerator outside of fake_accelerator()")

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu().numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict) -> "OnAccelerator":
        if id(self) not in memo:
            copy = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"OnAccelerator({tuple(self.shape)}, {self.dtype})"


@contextlib.contextmanager
def fake_accelerator() -> Iterator[Record]:
    """Within the context, code in this thread sees a GPU, cuda:0. Yields the record of what happens on it."""
    record = Record()

    def synchronize() -> None:
        record.syncs["synchronize", _place()] += 1

    def functions() -> dict[str, Callable]:  # new ones at each call, because dynamo identifies functions
        zeros = (
            "current_device",
            "current_device_index",
            "max_memory_allocated",
            "memory_allocated",
            "memory_reserved",
        )
        unseen = ("empty_cache", "reset_peak_memory_stats", "set_device")
        memory = {name: lambda *_: (MEMORY_BYTES, MEMORY_BYTES) for name in ("mem_get_info", "get_memory_info")}
        there = {"is_available": lambda: True, "device_count": lambda: 1, "synchronize": lambda *_: synchronize()}
        return {name: lambda *_: 0 for name in (*zeros, *unseen)} | memory | there

    cuda = {"get_device_capability": lambda *_: (9, 0)}
    accelerator = {"current_accelerator": lambda check_available=False: torch.device("cuda")}
    # transformers would load in other threads, where the modes are off; nothing compiles for a device that is missing.
    settings = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "TORCH_COMPILE_DISABLE": "1"}
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, create=True, **functions(), **cuda))
        stack.enter_context(mock.patch.multiple(torch.accelerator, create=True, **functions(), **accelerator))
        stack.enter_context(mock.patch.dict(os.environ, settings))
        # A moved module's parameters become OnAccelerator in place, so that tied ones stay tied.
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(_Computing(record))
        stack.enter_context(_Placing(record))
        yield record


class _Placing(TorchFunctionMode):
    """Creates tensors on the accelerator, and moves them there and back."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in MOVING:
            return self._moved(func, *args, **kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnAccelerator):
            kwargs = {"device": CUDA} | (kwargs or {})
        if not kwargs or kwargs.get("device") is None:
            return func(*args, **kwargs or {})
        if torch.device(kwargs["device"]).type != "cuda":  # something like zeros_like(x, device="cpu")
            args, kwargs = _with_tensors(_content, args), _with_tensors(_content, kwargs)
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self.record.mismatches[f"{func.__name__} with a generator on the CPU", _place()] += 1
        made = func(*args, **kwargs | {"device": CPU})
        if func in FROM_DATA and made.dim() and not isinstance(made, OnAccelerator):
            self.record.uploads[func.__name__, _place()] += 1
        return _with_tensors(_on_accelerator, made)

    def _moved(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What Tensor.to, cpu, cuda or type_as return."""
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            args = (CPU if func is torch.Tensor.cpu else CUDA,)
        device, changes = tensor.device, {key: kwargs[key] for key in ("copy", "memory_format") if key in kwargs}
        for value in (*args, *(kwargs.get(key) for key in ("device", "dtype", "other"))):
            if isinstance(value, torch.Tensor):
                device, changes["dtype"] = value.device, value.dtype
            elif isinstance(value, (str, torch.device)):
                device = torch.device(value)
            elif isinstance(value, torch.dtype):
                changes["dtype"] = value
        to_cuda, from_cuda = device.type == "cuda", isinstance(tensor, OnAccelerator)
        if to_cuda == from_cuda:
            return torch.Tensor.to(tensor, **changes if from_cuda else changes | {"device": device})
        if from_cuda:
            if device.type == "cpu":
                self.record.syncs["to the CPU", _place()] += 1
            return torch.Tensor.to(tensor.content, **changes | {"device": device, "copy": True})
        if tensor.dim() and not tensor.is_meta:
            self.record.uploads["to", _place()] += 1
        return _on_accelerator(torch.Tensor.to(tensor, **changes | {"copy": True}))


class _Computing(TorchDispatchMode):
    """Computes every operation with the CPU tensors behind its arguments."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to skip, and skipping takes time

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, facts = kwargs or {}, _facts(func)
        if facts.composite:  # in inference mode these arrive undecomposed
            with self:
                return func.decompose(*args, **kwargs)
        given: list[OnAccelerator] = []
        on_cpu: list[torch.Tensor] = []

        def content(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, OnAccelerator):
                given.append(tensor)
                return tensor.content
            if not tensor.is_meta:
                on_cpu.append(tensor)
            return tensor

        contents = [_with_tensors(content, a) for a in args]
        named = _with_tensors(content, kwargs) if kwargs else kwargs
        if not given:
            return func(*args, **kwargs)
        if facts.reshapes:
            raise NotImplementedError(f"{func} changes the shape of a tensor on the fake accelerator in place")
        if on_cpu or facts.waits or facts.indexes:
            self._note(facts, args, kwargs, on_cpu)
        if func is torch.ops.aten.histc.default and not contents[0].is_floating_point():  # only GPUs count integers
            return _wrapped(func(contents[0].double(), *contents[1:], **named).to(contents[0].dtype))
        result = func(*contents, **named)
        if not facts.written:
            return _with_tensors(_wrapped, result)
        whose = {id(t.content): t for t in given}  # in-place operations return what they were given
        return _with_tensors(lambda r: whose[id(r)] if id(r) in whose else _wrapped(r), result)

    def _note(self, facts: "_Facts", args: tuple, kwargs: dict, on_cpu: list[torch.Tensor]) -> None:
        """Record an operation on the accelerator that waits, uploads, or has arguments that must not be on the CPU."""
        name = facts.name
        if facts.waits and kwargs.get("output_size") is None:
            self.record.syncs[name, _place()] += 1
        if facts.indexes:
            indices: list[torch.Tensor] = []
            _with_tensors(indices.append, args[1])
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.record.syncs[f"{name} by mask", _place()] += 1
            if isinstance(args[0], OnAccelerator):
                uploaded = [t for t in on_cpu if any(t is index for index in indices)]
                if uploaded:
                    self.record.uploads[f"{name} by CPU tensor", _place()] += len(uploaded)
                on_cpu = [t for t in on_cpu if t.dim() and not any(t is index for index in uploaded)]
        elif name == "copy_":
            if not isinstance(args[0], OnAccelerator):
                self.record.syncs["copy_ to the CPU", _place()] += 1
            elif on_cpu[0].dim():
                self.record.uploads["copy_", _place()] += 1
            return
        elif facts.takes_numbers:
            written = [(kwargs | dict(enumerate(args))).get(key) for key in facts.written]
            on_cpu = [t for t in on_cpu if t.dim() or any(t is w for w in written)]
        if on_cpu:
            sizes = ", ".join(str(tuple(t.shape)) for t in on_cpu)
            self.record.mismatches[f"{name} with {sizes} on the CPU", _place()] += 1


class _Facts(NamedTuple):
    """What matters here of an operation of PyTorch."""

    name: str
    composite: bool  # without a kernel of its own, made of other operations
    waits: bool
    indexes: bool
    takes_numbers: bool  # 0-dimensional tensors on the CPU
    reshapes: bool  # an argument, in place
    written: tuple[int | str, ...]  # positions and names of the arguments that it changes in place


@functools.cache
def _facts(func: Any) -> _Facts:
    name, has = (
        func.overloadpacket.__name__,
        functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name()),
    )
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return _Facts(
        name,
        has("CompositeImplicitAutograd") and not has("CPU"),
        name in WAITING,
        name in INDEXING,
        torch.Tag.pointwise in func.tags or name in TAKING_NUMBERS,
        torch.Tag.inplace_view in func.tags,
        tuple(key for pair in written for key in pair),
    )


def _with_tensors(function: Any, value: Any) -> Any:
    """`value` with each tensor in it replaced by `function` of that tensor."""
    kind = type(value)
    if kind is OnAccelerator or isinstance(value, torch.Tensor):
        return function(value)
    if kind is list or kind is tuple:
        return kind([_with_tensors(function, v) for v in value])
    if kind is dict:
        return {k: _with_tensors(function, v) for k, v in value.items()}
    return value


def _content(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.content if isinstance(tensor, OnAccelerator) else tensor


def _wrapped(content: torch.Tensor) -> torch.Tensor:
    """A result of an operation, as a tensor on the accelerator; on the meta device it stays there."""
    if content.is_meta:
        return content
    if torch.is_inference_mode_enabled() and not content.is_inference():  # a view of an ordinary tensor
        with torch.inference_mode(False):
            return OnAccelerator(content)
    return OnAccelerator(content)


def _on_accelerator(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the accelerator, with its requires_grad."""
    if isinstance(tensor, OnAccelerator) or tensor.is_meta:
        return tensor
    result = _wrapped(tensor.detach())
    return result.requires_grad_() if tensor.requires_grad and tensor.is_leaf else result


def _place() -> str:
    """The innermost line in the repository, and what it called outside PyTorch, if anything."""
    frame, outside = sys._getframe(1), ""
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_absolute() and TORCH not in path.parents and path != Path(__file__):
            if ROOT in path.parents and "site-packages" not in path.parts:
                return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}{outside}"
            outside = outside or f" ({'/'.join(path.parts[-3:])}:{frame.f_lineno})"
        frame = frame.f_back
    return outside.strip() or "?"
