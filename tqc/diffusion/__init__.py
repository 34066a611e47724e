"""Diffusion transformers: attention shared between denoising steps and between guidance branches.

`plan` says what is shared when, `variants` compiles the transformer once for each kind of call, `dispatcher` picks one
by the timestep, and `state` holds what goes from one call to the next. `pipeline` and `vae` are what users call.
"""
