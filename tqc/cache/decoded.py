"""What a view of a packed tensor is where no packed one can show it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.torch_private import arguments_of, disabled_torch_function, is_view_op, no_views, pytree

aten = torch.ops.aten


class Decoded(Tensor):
    """Dense values that a view op gave of a packed tensor. They are a copy, so a write into them would not be seen
    there: it raises, as does one into the packed tensor while they are in use. All other ops see a dense tensor.

    Attributes:
        dense: the dense tensor.
        packed: its rows as a packed tensor, which it becomes again once it has four dimensions: `x[i]`, of three, by
            `[None]`, and `torch.stack` of single rows, of five, by `squeeze(1)`; or None.
    """

    dense: Tensor
    packed: Any
    packed_storage = None  # it shares the memory of none, see `tqc.cache.views`
    __torch_function__ = disabled_torch_function

    @staticmethod
    def of(values: Any, packed: Any = None) -> Any:
        """The result of a view op: a tensor, or several."""
        if not isinstance(values, Tensor):
            return type(values)(map(Decoded.of, values))
        result = values.as_subclass(Decoded)
        result.dense, result.packed = values, packed
        return result

    # As for a packed tensor: autograd would make it the base of what is packed, and keep it alive.
    def __getitem__(self, index: Any) -> Tensor:
        with no_views():
            return super().__getitem__(index)

    def squeeze(self, *dims: Any) -> Tensor:
        with no_views():
            return super().squeeze(*dims)

    # What torch refuses of a subclass.
    def numpy(self, *, force: bool = False) -> Any:
        array = self.dense.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.dense.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dense)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = result = self.dense.clone()
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, Decoded) for value in written_by(func, args, kwargs)):
            raise NotImplementedError(
                f"{func} would write into a decoded part of a packed tensor, which is a copy: the packed tensor would "
                "not change. Write into that one, as in x[:, :, 5:6] = new, or .clone() the part first"
            )
        x, *rest = args or (None,)
        if isinstance(x, Decoded) and x.packed is not None:
            if (func, x.dim(), *rest) in ((aten.unsqueeze.default, 3, 0), (aten.squeeze.dim, 5, 1)):
                return x.packed.detach()
        args, kwargs = pytree.tree_map_only(Decoded, lambda x: x.dense, (args, kwargs))
        result = func(*args, **kwargs)
        return Decoded.of(result) if is_view_op(func) else result


def written_by(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes into."""
    arguments = arguments_of(func)
    named = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    return [leaf for a in arguments if a.is_write for leaf in pytree.tree_leaves(named.get(a.name))]
