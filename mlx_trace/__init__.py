"""A model of MLX as an FX graph, and an FX graph as a program of MLX.

    capture     a model of mlx-lm, traced for one batch and length -> a graph that `tqc.passes` can rewrite
    Executor    a graph of torch functions -> calls on MLX arrays

It needs `mlx`, and for `capture` also `mlx-lm`; nothing here is imported with `tqc`.
"""

import importlib.util

if importlib.util.find_spec("mlx") is None:
    raise ModuleNotFoundError("this needs MLX: pip install mlx mlx-lm, on Linux 'mlx[cpu]' mlx-lm", name="mlx")
