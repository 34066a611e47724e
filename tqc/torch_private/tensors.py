"""Tensors: subclasses, views, what they share, how dynamo sees their sizes."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tqc.torch_private.lookup import find
from tqc.torch_private.needs import CROPS, PREALLOCATED, lacking

# Of every kind of fake tensor; no public name. Used to tell tracing from running.
FakeTensor: Any = find("torch._subclasses.fake_tensor.FakeTensor", type("NoFakeTensor", (), {}))
# Tensors without memory for graphs that were not traced by torch. No public way.
FakeTensorMode: Any = find("torch._subclasses.fake_tensor.FakeTensorMode")
# What dynamo's graphs call for torch's own statistics; an executor skips it.
LOG_USAGE: Any = find("torch._C._log_api_usage_once")

# `tree_map_only` and the like; `torch.utils.pytree` is not there yet (2.15).
pytree: Any = find("torch.utils._pytree")

# A tensor subclass without `__torch_function__`; the public `DisableTorchFunctionSubclass` is a context in which a
# method of the subclass would call on, and dynamo knows subclasses that it can open by this very function.
disabled_torch_function: Any = find("torch._C._disabled_torch_function_impl", Tensor.__torch_function__)


def make_wrapper_subclass(cls: type, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor with a shape and no memory of its own. No public way, though torch's notes on subclasses teach it."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


@cache
def _view_keys() -> Any:
    return None if lacking(CROPS) else torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def no_views() -> contextlib.AbstractContextManager[Any]:
    """In it, autograd makes no tensor the base of what is sliced from it. `torch.no_grad` does not do that; under
    `torch.inference_mode` it is so, but tensors made there cannot be written to outside."""
    keys = _view_keys()
    return contextlib.nullcontext() if keys is None else torch._C._ExcludeDispatchKeyGuard(keys)


def swap_tensors(a: Tensor, b: Tensor) -> None:
    """Exchange two tensor objects, their classes and attributes included.

    The public `torch.utils.swap_tensors` refuses tensors with weak references, and dynamo's guards hold such to every
    cache.

    Raises:
        RuntimeError: if torch holds one of them elsewhere, too, or cannot exchange tensors.
    """
    if lacking(PREALLOCATED):
        raise RuntimeError("this torch cannot exchange tensors")
    torch._C._swap_tensor_impl(a, b)
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows `tensor` as a view of another. No public way."""
    return tensor._is_view()


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory. The public `data_ptr()` of the storage fails on fake tensors."""
    return tensor.untyped_storage()._cdata


def writes(tensor: Tensor) -> int:
    """How often `tensor` was written to, so that an edit shows. No public way, though autograd's notes name it."""
    return tensor._version


def arguments_of(op: Any) -> Any:
    """Arguments of an operator's schema, each with `name` and `is_write`. No public way."""
    return op._schema.arguments


def is_view_op(op: Any) -> bool:
    """Whether an operator gives views of its first argument, by its schema. No public way."""
    aliases = [result.alias_info for result in op._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


# Attribute of a tensor: which of its sizes vary. `mark_dynamic` sets it on the parts of a packed tensor as well.
DYNAMIC_SIZES = "_dynamo_weak_dynamic_indices"


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Tell dynamo that a size varies. The public `torch._dynamo.mark_dynamic` is an error where a model's code makes
    the size a constant; no hint is."""
    if mark := _marker():
        mark(tensor, dim)


@cache
def _marker() -> Any:
    return find("torch._dynamo.maybe_mark_dynamic")
