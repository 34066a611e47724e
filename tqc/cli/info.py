"""`tqc info`: what is installed, which kernels run here, the presets, the folders."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("tqai-compiler", "torch", "transformers", "triton", "mlx", "onnx", "onnxruntime")


def describe() -> dict[str, Any]:
    """Everything that `tqc info` shows, as plain data."""
    import dataclasses

    import torch

    from tqc.config import PRESETS, Config
    from tqc.lowering.select import providers
    from tqc.torch_private import missing

    settings = {}
    for name in PRESETS:
        config = dataclasses.asdict(Config.from_options({"preset": name}))
        settings[name] = {key: config[key] for key in ("bits_k", "bits_v", "sink_tokens", "residual_window")}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": ["cpu"] + [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in PACKAGES},
        "providers": {provider.name: provider.unavailable() for provider in providers()},
        "missing": missing(),
        "presets": settings,
        "cache_dir": _cache_dir(),
    }


def tables(facts: dict[str, Any]) -> list[Table]:
    from rich.table import Table

    machine = Table("", "", title="installation", show_header=False)
    machine.add_row("python", facts["python"])
    machine.add_row("platform", facts["platform"])
    machine.add_row("devices", ", ".join(facts["devices"]))
    machine.add_row("cache folder", facts["cache_dir"])
    for name, version in facts["packages"].items():
        machine.add_row(name, version or "[dim]not installed[/dim]")
    kernels = Table("provider", "runs here", title="kernels")
    for name, reason in facts["providers"].items():
        kernels.add_row(name, f"no: {reason}" if reason else "yes")
    columns = list(next(iter(facts["presets"].values())))
    presets = Table("preset", *columns, title="presets")
    for name, settings in facts["presets"].items():
        presets.add_row(name, *(str(settings[column]) for column in columns))
    if not facts["missing"]:
        return [machine, kernels, presets]
    missing = Table("feature", "what is lost", title="not with this torch")
    for name, reason in facts["missing"].items():
        missing.add_row(name, reason)
    return [machine, kernels, missing, presets]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_dir() -> str:
    from tqc.cache_folder import cache_folder

    try:
        return str(cache_folder())
    except OSError as error:
        return str(error)
