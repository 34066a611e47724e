"""Kernels: one provider a platform, chosen by `select` for a graph that the passes have rewritten."""
