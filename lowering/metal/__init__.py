"""Kernels for MLX, generated: Metal for Apple GPUs, CUDA for NVIDIA's. `launch` calls them with arrays."""
