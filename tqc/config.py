"""What a user can set: `torch.compile(model, backend="tqai", options={...})` takes the fields of `Config`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tqc.format import PackedFormat
from tqc.format.rotation import ROTATIONS
from tqc.plugins.monitor import Monitor
from tqc.strategies import TIERED, Strategy, make_monitor, make_strategy
from tqc.widths import Widths

OFF = 16

# Settings by name. `default` is what no options give; the figures behind them are in benchmarks/results.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"bits_k": 3, "bits_v": 3},
    "quality": {"bits_k": 4, "bits_v": 4},
    "small": {"bits_k": 2, "bits_v": 2, "residual_window": 128},
    "kv-only": {"bits_k": 4, "bits_v": 2},
    "k3v2": {"bits_k": 3, "bits_v": 2},
    "off": {"bits_k": OFF, "bits_v": OFF},
}
# Modes of torch.compile that are no preset.
CUDA_GRAPHS_MODE = "reduce-overhead"
REST = ("inductor", "eager")


@dataclass(frozen=True)
class Config:
    """Options of the backend.

    Attributes:
        bits_k, bits_v: width of key and value codes, 1 to 8; 16 for both leaves the cache dense.
        sink_tokens: tokens at the start that stay dense.
        residual_window: recent tokens that stay dense at most, a multiple of 32.
        rotation: "hadamard" or "haar".
        seed: of the rotation.
        fold_values: multiply the weights around attention by the rotation of V, where the graph shows both, so that
            no kernel rotates values. It keeps a second copy of those weights, made anew when a weight changes (an edit
            through `weight.data`, which torch does not count, is seen at the next prompt).
        skip_layers: layers whose cache stays dense, as the model numbers them (`layers.3` is 3; a decoder's self and
            cross attention are one layer); negative from the last one that has a cache. Layers without one, those of
            a vision tower, do not count.
        widths: file of `tqc calibrate`, or the `Widths` in it: each layer's keys and values get their own width, in
            place of `bits_k` and `bits_v`. The file is read when the model is compiled.
        budget_bits: choose other widths by what the file knows, of at most so many code bits an element, as
            `Widths.bits` counts them; with strategy "tiered", the tiers.
        strategy: what becomes of tokens that leave the window: None (all are kept alike), "evict" (of each group the
            share `keep` is, at `bits_k` and `bits_v`) or "tiered" (each group is sorted into `tiers`).
        scorer: the plugin by whose scores (see `tqc plugins`), and `scorer_kwargs`, its parameters.
        keep: for "evict", 1/2 if None; a share of whole pages, as 1/4 or 3/8.
        tiers: for "tiered", pages and bits of each tier, as "1x4+2x2/4": of each four pages' worth of tokens one page
            of 4 bits, two of 2 bits, the rest evicted. `budget_bits` chooses them by code bits otherwise.
        monitor: a plugin that watches one head while the model generates, as "fidelity" or "fidelity(head=1,every=8)";
            `tqc.monitor(cache)` says what it saw.
        provider: which kernels: "auto", or one that must be used ("reference", "cpu", "triton").
        cuda_graphs: record steps whose caches are preallocated as CUDA graphs and replay them; it is what
            `mode="reduce-overhead"` sets (`tqc.explain` says what was not recorded, and why).
        rest: what runs the rest of the graph: "inductor" or "eager" (starts in seconds).
        debug_dir: folder for the graph before and after each pass, as readable text.
    """

    bits_k: int = 3
    bits_v: int = 3
    sink_tokens: int = 4
    residual_window: int = 96
    rotation: str = "hadamard"
    seed: int = 0
    fold_values: bool = False
    skip_layers: tuple[int, ...] = ()
    widths: Widths | str | os.PathLike[str] | None = None
    budget_bits: float | None = None
    strategy: str | None = None
    scorer: str | None = None
    scorer_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    keep: float | None = None
    tiers: str | None = None
    monitor: str | None = None
    provider: str = "auto"
    cuda_graphs: bool = False
    rest: str = "inductor"
    debug_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("bits_k", "bits_v", "sink_tokens", "residual_window", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for name in ("fold_values", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("bits_k", "bits_v"):
            value = getattr(self, name)
            if not (1 <= value <= 8 or value == OFF):
                raise ValueError(f"{name} must be 1 to 8, or {OFF} to leave the cache dense; got {value}")
        if (self.bits_k == OFF) != (self.bits_v == OFF):
            raise ValueError(
                f"bits_k and bits_v must both be {OFF} or neither; got bits_k={self.bits_k}, bits_v={self.bits_v}"
            )
        for name, allowed in {"rest": REST, "rotation": ROTATIONS}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in self.skip_layers):
            raise TypeError(f"skip_layers must be integers, got {self.skip_layers!r}")
        self._settle_widths()
        if self.watcher and self.off:
            raise ValueError(f"monitor {self.monitor!r} is for packed caches, and the cache is left dense")
        if self.groups and self.off:
            raise ValueError(f"strategy {self.strategy!r} is for packed caches, and the cache is left dense")
        if not self.off:
            self.formats(64, 64)

    def _settle_widths(self) -> None:
        """Read the file of widths and choose anew if there is a budget."""
        if self.budget_bits is not None:
            if isinstance(self.budget_bits, bool) or not isinstance(self.budget_bits, (int, float)):
                raise TypeError(f"budget_bits must be a number, got {self.budget_bits!r}")
            if self.widths is None and self.strategy != TIERED:
                raise ValueError(f"budget_bits chooses among widths, so it needs these too; got {self.budget_bits}")
        if self.widths is not None and self.strategy == TIERED:
            raise ValueError(f"widths and strategy {TIERED!r} cannot both be given: tiers have their own bits")
        if self.widths is None:
            return
        widths = read_widths(self.widths)
        if self.off:
            raise ValueError("widths are for packed caches, and the cache is left dense")
        widths = widths if self.budget_bits is None else widths.solved(self.budget_bits)
        widths.of_rows()
        object.__setattr__(self, "widths", widths)

    @functools.cached_property
    def groups(self) -> Strategy | None:
        """The strategy with its scorer; None where all tokens are kept alike."""
        return make_strategy(self.strategy, self.scorer, self.scorer_kwargs, self.keep, self.tiers, self.budget_bits)

    @functools.cached_property
    def watcher(self) -> Monitor | None:
        """The monitor; None where nothing is watched."""
        return make_monitor(self.monitor)

    @property
    def off(self) -> bool:
        return self.bits_k == OFF

    def of_layer(self, layer: int | None, heads: int, k_head_dim: int, v_head_dim: int) -> Config:
        """The options of one layer: its own widths where there are `widths`. Raises ValueError if they lack it."""
        if not isinstance(self.widths, Widths):
            return self
        bits_k, bits_v = self.widths.of_layer(layer, heads, k_head_dim, v_head_dim)
        return dataclasses.replace(self, bits_k=bits_k, bits_v=bits_v, widths=None, budget_bits=None)

    def formats(
        self, k_head_dim: int, v_head_dim: int, keep: int | None = None, repeats: int | None = 1
    ) -> tuple[PackedFormat, PackedFormat]:
        """Formats of keys and values, of `bits_k` and `bits_v` (see `of_layer`).

        Args:
            repeats: query heads to a head of keys; None where the strategy is left out.

        Raises:
            ValueError: where a head_dim cannot be packed.
        """
        shared = (self.sink_tokens, self.residual_window, self.rotation, self.seed)
        found = []
        for dim, bits, centred in ((k_head_dim, self.bits_k, True), (v_head_dim, self.bits_v, False)):
            groups = self.groups.groups(bits, repeats if centred else None) if self.groups and repeats else None
            width = groups.tiers[0][1] if groups else bits
            found.append(PackedFormat(dim, width, centred, *shared, keep=keep, groups=groups))
        return found[0], found[1]

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Config:
        """Check the `options` or `mode` of torch.compile; `preset` names a base that the others override.

        Raises:
            ValueError, TypeError: naming the option, its value and what is allowed.
        """
        given = {**options_of_mode(mode), **(options or {})}
        preset = given.pop("preset", "default")
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}{_nearest(preset, PRESETS)}")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(
                    f"unknown option {name!r}{_nearest(name, names)}; options are preset, {', '.join(names)}"
                )
        if "skip_layers" in given:
            given["skip_layers"] = tuple(given["skip_layers"])
        if given.get("widths") is not None and (uniform := given.keys() & {"bits_k", "bits_v"}):
            raise ValueError(f"{min(uniform)} and widths cannot both be given: widths hold the bits of each layer")
        settings = {**PRESETS[preset], **given}
        if settings.get("strategy") is not None and "residual_window" not in given:
            least = cls(**{**settings, "residual_window": 1 << 16}).groups
            settings["residual_window"] = max(
                settings.get("residual_window", cls.residual_window), least.least_window if least else 0
            )
        return cls(**settings)


def options_of_mode(mode: str | None) -> dict[str, Any]:
    """The options that a `mode` of torch.compile stands for: a preset, or "reduce-overhead".

    Raises:
        ValueError: for any other mode.
    """
    if mode is None:
        return {}
    if mode == CUDA_GRAPHS_MODE:
        return {"cuda_graphs": True}
    if mode not in PRESETS:
        modes = (CUDA_GRAPHS_MODE, *PRESETS)
        raise ValueError(f"mode must be one of {', '.join(modes)}; got {mode!r}{_nearest(mode, modes)}")
    return {"preset": mode}


def read_widths(widths: Any) -> Widths:
    """The option `widths`: itself, or what the file has.

    Raises:
        TypeError: if it is neither.
        ValueError: if the file cannot be opened or holds no widths.
    """
    if isinstance(widths, Widths):
        return widths
    if not isinstance(widths, (str, os.PathLike)):
        raise TypeError(f"widths must be the path of a file that `tqc calibrate` wrote, or Widths; got {widths!r}")
    try:
        return Widths.load(widths)
    except OSError as error:
        raise ValueError(f"widths {os.fspath(widths)!r} cannot be read: {error.strerror or error}") from None


def _nearest(name: Any, valid: Any) -> str:
    close = difflib.get_close_matches(str(name), [*valid, "preset"], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def cacheable_dtype(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16, torch.float16)
