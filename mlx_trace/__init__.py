"""A model of MLX as an FX graph, and an FX graph as a program of MLX.

    capture     a model of mlx-lm, traced for one batch and length -> a graph that `tqc.passes` can rewrite
    pack        which caches of a model are packed; such a graph, rewritten and realized
    Executor    a graph of torch functions -> calls on MLX arrays
    packed      keys or values of one layer as arrays, with `placement`, `codec` and `attention`: what the ops mean

It needs `mlx`, and for `capture` also `mlx-lm`; nothing here is imported with `tqc`.
"""

import importlib.util

if importlib.util.find_spec("mlx") is None:
    raise ModuleNotFoundError("this needs MLX: pip install mlx mlx-lm, on Linux 'mlx[cpu]' mlx-lm", name="mlx")
