"""The CUDA provider: Triton kernels."""
