"""What the CPU kernels can take."""

import torch

MAX_HEAD_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
