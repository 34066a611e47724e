"""`tqc info`: what is installed, which kernels run here, the presets, the folders."""

from __future__ import annotations

import importlib
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
    from tqc.models import cache_dir

    settings = {}
    for name in PRESETS:
        config = dataclasses.asdict(Config.from_options({"preset": name}))
        settings[name] = {key: config[key] for key in ("bits_k", "bits_v", "sink_tokens", "residual_window")}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": ["cpu"] + [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in PACKAGES},
        "providers": {name: _unsupported(name) for name in _providers()},
        "presets": settings,
        "cache_dir": str(cache_dir()),
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
    return [machine, kernels, presets]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    from tqc.config import PROVIDERS

    return [name for name in PROVIDERS if name != "auto"]


def _unsupported(provider: str) -> str | None:
    """Why a provider does not run here, or None if it does."""
    try:
        return importlib.import_module(f"tqc.lowering.{provider}").supported()
    except ImportError as error:
        return str(error)
