"""What attention and blocks gave, kept from one call of a transformer to the next, dense or packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tqc.diffusion.plan import Cell
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import decode_pages, decoded, encode_pages
from tqc.passes.rewrites.step_state import StateKey

STATE_BITS = (8, 4, 2)
ORDERS = 3


@dataclass(frozen=True)
class PackedState:
    """A state [batch, n, heads, head_dim] of which all whole pages of 32 tokens are packed, and the rest is dense.

    Attributes:
        pages: uint8 [batch, heads, n // 32, page_bytes].
        rest: the last n % 32 tokens as they came.
    """

    fmt: PackedFormat
    pages: Tensor
    rest: Tensor

    @classmethod
    def of(cls, state: Tensor, bits: int) -> PackedState:
        fmt = PackedFormat(state.shape[-1], bits, centred=False)
        whole = state.shape[1] // PAGE_TOKENS * PAGE_TOKENS
        rows = state[:, :whole].transpose(1, 2)
        return cls(fmt, encode_pages(rows, rows[:, :, :0], fmt), state[:, whole:].clone())

    def read(self) -> Tensor:
        head = self.rest[:, :0].transpose(1, 2)
        rows = decoded(decode_pages(self.pages, head, self.fmt), head, self.fmt)
        return torch.cat([rows.transpose(1, 2).to(self.rest.dtype), self.rest], 1)

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.rest.nbytes


@dataclass(frozen=True)
class Scope:
    """The call of a pipeline that a generation belongs to.

    Attributes:
        guided: whether a batch holds both branches of the guidance.
        timesteps: those of the pipeline's scheduler; None if it has none.
        weights: of the steps' errors, by step; none where all weigh the same.
    """

    guided: Callable[[], bool]
    timesteps: Callable[[], Tensor | None]
    weights: Callable[[], Sequence[float]] = tuple


@dataclass
class Branch:
    """What one branch of the guidance keeps.

    Attributes:
        layers: the layer of each state.
        held: states, newest first, each with the step that computed it.
        computed: the last two steps that kept states, newest first.
        errors: see `Progress`, of the last computed step.
        change: see `Progress`.
    """

    layers: dict[StateKey, int] = field(default_factory=dict)
    held: dict[StateKey, list[tuple[int, Tensor | PackedState]]] = field(default_factory=dict)
    computed: list[int] = field(default_factory=list)
    errors: tuple[float, ...] = ()
    change: float = float("inf")

    def steps(self, layer: int, what: str) -> int:
        """Of how many steps a layer's states are."""
        counts = [len(held) for key, held in self.held.items() if self.layers[key] == layer and key.what == what]
        return min(counts, default=0)

    def trim(self, layer: int, what: str, count: int) -> None:
        """Forget all but the last `count` steps."""
        for key in [key for key, of in self.layers.items() if of == layer and key.what == what]:
            del self.held[key][count:]
            if not self.held[key]:
                del self.held[key], self.layers[key]


@dataclass
class Generation:
    """What one generation keeps, by guidance branch, and where it stands.

    Attributes:
        scope: the pipeline's call that began it, and ends it; None where a transformer is called by itself.
        measures: whether forecasts are compared with what a computed step gives.
        step: of the transformer's last call.
        called: the branches that were called in this step, in order.
        lent: the layers of which the branch called first keeps attention for the other.
        cells: what the schedule says of this step.
        rises: how often the timestep rose behind a first step, in a row.
        frozen: whether what is kept is thrown away.
    """

    scope: Scope | None = None
    bits: int | None = None
    measures: bool = False
    step: int = -1
    timestep: float | None = None
    like: tuple[object, ...] | None = None
    called: list[str] = field(default_factory=list)
    lent: set[int] = field(default_factory=set)
    cells: tuple[Cell, ...] = ()
    rises: int = 0
    frozen: bool = False
    branches: dict[str, Branch] = field(default_factory=dict)
    _missed: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Back to where nothing was called."""
        self.step, self.timestep, self.like = -1, None, None
        self.called, self.lent, self.cells, self.branches, self._missed = [], set(), (), {}, []

    def branch(self, name: str) -> Branch:
        return self.branches.setdefault(name, Branch())

    def keep(self, branch: str, layer: int, key: StateKey, state: Tensor) -> None:
        """The newest state of its kind."""
        if self.frozen:
            return
        of = self.branch(branch)
        state = state.detach()
        if self.measures and key in of.held:
            self._missed.append(self._measure(of, key, state))
        packed = self.bits is not None and state.dim() == 4 and state.shape[-1] % 8 == 0
        held = PackedState.of(state, int(self.bits or 0)) if packed else state
        of.layers[key] = layer
        of.held.setdefault(key, []).insert(0, (self.step, held))

    def settle(self, branch: str) -> None:
        """A step was computed; what was measured in it becomes the branch's errors."""
        of = self.branch(branch)
        of.computed, of.change = [self.step, *of.computed[:1]], 0.0
        if self._missed:
            orders = min(map(len, self._missed))
            own, *sums = torch.stack([missed[:orders] for missed in self._missed]).sum(0).tolist()
            of.errors = tuple((missed / max(own, 1e-30)) ** 0.5 for missed in sums)
            self._missed = []

    def read(self, branch: str, key: StateKey, index: int = 0) -> Tensor:
        return _dense(self.branches[branch].held[key][index][1])

    def read_all(self, branch: str, layer: int, what: str) -> dict[StateKey, Tensor]:
        """The newest states of a layer."""
        of = self.branch(branch)
        return {key: self.read(branch, key) for key, n in of.layers.items() if n == layer and key.what == what}

    def note_change(self, branch: str, before: Mapping[StateKey, Tensor], weight: float) -> None:
        """Add how far the newest states are from what they were `before`, in the mean and relative to it."""
        moved = torch.stack([(self.read(branch, key) - was).abs().mean() for key, was in before.items()]).sum()
        size = torch.stack([was.abs().mean() for was in before.values()]).sum()
        self.branch(branch).change += weight * float(moved / size.clamp_min(1e-30))

    def weights(self, branch: str, key: StateKey, terms: int) -> Tensor:
        """Of the last states in a forecast of this step, float32 [terms]."""
        steps = [step for step, _ in self.branches[branch].held[key][:terms]]
        return torch.tensor(forecast_weights(steps, self.step))

    def take_over(self, branch: str, other: str, layer: int, key: StateKey) -> None:
        """The newest state of the other branch, for both in one place."""
        if self.frozen:
            return
        of = self.branch(branch)
        of.layers[key] = layer
        of.held.setdefault(key, []).insert(0, self.branches[other].held[key][0])

    def _measure(self, of: Branch, key: StateKey, state: Tensor) -> Tensor:
        """Squares of `state`, and of what forecasts of each order miss of it."""
        states = [_dense(held) for _, held in of.held[key][:ORDERS]]
        missed = [state.float().square().sum()]
        for terms in range(1, len(states) + 1):
            weights = forecast_weights([step for step, _ in of.held[key][:terms]], self.step)
            forecast = sum(weight * held for weight, held in zip(weights, states, strict=False))
            missed.append((forecast - state).float().square().sum())
        return torch.stack(missed)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, once where two branches share it."""
        states = (held for of in self.branches.values() for rows in of.held.values() for _, held in rows)
        return sum({id(held): held.nbytes for held in states}.values())


def _dense(held: Tensor | PackedState) -> Tensor:
    return held.read() if isinstance(held, PackedState) else held


def forecast_weights(steps: Sequence[int], step: int) -> list[float]:
    """Weights of values at `steps` in the polynomial through them, at `step` (Lagrange)."""
    weights = []
    for one in steps:
        weight = 1.0
        for other in steps:
            if other != one:
                weight *= (step - other) / (one - other)
        weights.append(weight)
    return weights
