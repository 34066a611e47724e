"""The functions of the provider. Importing this imports Triton."""

from tqc.lowering.triton.append import append, append_pair
from tqc.lowering.triton.attend import attend, attend_paged
from tqc.lowering.triton.read import read

__all__ = ["append", "append_pair", "attend", "attend_paged", "read"]
