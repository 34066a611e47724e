"""Lowerings of the dialect: each provider is a module with the functions of `tqc.ops`, made fast for one platform.

A provider has

    NAME                                        shown by `tqc.explain`
    supported() -> str | None                   why this machine cannot run it, or None
    accepts(k_fmt, v_fmt, dtype, device_type) -> str | None     why it cannot take these arguments, or None
    append, read, attend                        as in `tqc.ops`, same arguments, same results

and may have

    FOLDED = True                               if these take folded formats; without it, none reaches them
    append_pair(k_pages, k_dense, k_state, key, v_pages, v_dense, v_state, value, start, k_spec, v_spec)
                                                append of keys and values in one launch
    make_chain, run_chain, chain_seconds        to run compiled regions and attention in turn by one call, see
                                                `tqc.execute.chains`
"""

from __future__ import annotations

import importlib

import torch

from tqc.format import PackedFormat

# Best first; the reference takes everything.
PROVIDERS = ("triton", "cpu", "reference")


def choose(
    k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype, device_type: str, requested: str = "auto"
) -> tuple[str, list[str]]:
    """The provider for one attention site, and why better ones were passed over.

    Raises:
        ValueError: if a provider was requested by name and cannot serve.
    """
    refusals: list[str] = []
    for name in PROVIDERS if requested == "auto" else (requested,):
        provider = importlib.import_module(f"tqc.lowering.{name}")
        reason = provider.supported() or provider.accepts(k_fmt, v_fmt, dtype, device_type)
        if v_fmt.folded and not getattr(provider, "FOLDED", False):
            reason = reason or "takes no folded values"
        if reason is None:
            return name, refusals
        refusals.append(f"{name}: {reason}")
    raise ValueError(f"provider {requested!r} cannot be used: {'; '.join(refusals)}")
