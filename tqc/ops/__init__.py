"""The dialect: the ops that passes put into a graph and that every target realizes. It imports torch and `tqc.format`.

    pack, extend, write, rewind, fork   make a cache of dense tokens, or of another cache
    attend                              softmax attention to a cache and to new tokens
    score                               which tokens of a group are kept, for `pack` and `extend`
    read                                dense tokens
    fold, unfold                        into the basis of a folded format, and back
    window                              a sliding window of a preallocated cache, for `extend`
    adopt, update                       where a cache belongs to the caller: pack it, and say what becomes of it

`attention` is a function of dense tensors, for front ends, where torch has none. `op` says what an op is, `value` what
nodes hold; `planes` has the reference's work on the parts of a cache, which is also what a provider's kernels do, and
`traceable` the same in static shapes.
"""

from tqc.ops.adopt import adopt
from tqc.ops.attend import attend
from tqc.ops.attention import attention
from tqc.ops.extend import extend
from tqc.ops.fold import fold
from tqc.ops.fork import fork
from tqc.ops.op import Op, op
from tqc.ops.pack import pack
from tqc.ops.read import read
from tqc.ops.rewind import rewind
from tqc.ops.score import score
from tqc.ops.unfold import unfold
from tqc.ops.update import update
from tqc.ops.value import TENSORS, PackedValue, Planes, example, is_packed, set_example
from tqc.ops.window import window
from tqc.ops.write import write

__all__ = [
    "TENSORS",
    "Op",
    "PackedValue",
    "Planes",
    "adopt",
    "attend",
    "attention",
    "example",
    "extend",
    "fold",
    "fork",
    "is_packed",
    "op",
    "pack",
    "read",
    "rewind",
    "score",
    "set_example",
    "unfold",
    "update",
    "window",
    "write",
]
