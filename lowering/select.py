"""The providers there are, and which one serves: chosen for each attention site after the passes."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache

import torch

import tqc.lowering
from tqc.format import PackedFormat
from tqc.lowering.provider import Provider, Unavailable

log = logging.getLogger(__name__)

AUTO = "auto"


@cache
def providers() -> list[Provider]:
    """All of them, best first; the last one, the reference, takes everything."""
    modules = (importlib.import_module(f"tqc.lowering.{m.name}") for m in pkgutil.iter_modules(tqc.lowering.__path__))
    found = [module.PROVIDER for module in modules if hasattr(module, "PROVIDER")]
    return sorted(found, key=lambda provider: provider.rank)


def named(name: str) -> list[Provider]:
    """The providers that the option `provider` stands for, in order.

    Raises:
        ValueError: if there is none of that name.
    """
    found = [provider for provider in providers() if name in (AUTO, provider.name)]
    if not found:
        names = ", ".join([AUTO, *(provider.name for provider in providers())])
        raise ValueError(f"provider must be one of {names}; got {name!r}")
    return found


def choose(
    k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype, device_type: str, requested: str = AUTO
) -> tuple[Provider, list[str]]:
    """The provider for one attention site, its kernels loaded, and why better ones were passed over.

    Raises:
        ValueError: if a provider was requested by name and cannot serve.
    """
    refusals: list[str] = []
    for provider in named(requested):
        reason = provider.supports(k_fmt, v_fmt, dtype, device_type)
        if v_fmt.folded and not provider.folded:
            reason = reason or "takes no folded values"
        if k_fmt.groups and not provider.grouped and provider is not providers()[-1]:
            reason = reason or "takes no groups of tokens"
        if reason is None:
            try:
                _ = provider.kernels
            except Unavailable as error:
                reason = str(error)
                if requested == AUTO:
                    _warn(provider.name, reason)
        if reason is None:
            return provider.for_groups if k_fmt.groups else provider, refusals
        refusals.append(f"{provider.name}: {reason}")
    raise ValueError(f"provider {requested!r} cannot be used: {'; '.join(refusals)}")


@cache
def _warn(name: str, reason: str) -> None:
    """Say once why better kernels are passed over."""
    log.warning("the %r kernels cannot be used, slower ones run instead: %s", name, reason)
