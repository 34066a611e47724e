"""What a monitor has seen of a cache: `tqc.monitor(cache)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor
from tqc.plugins.monitor import Moment, Monitor

RECORD = 256
_SPARE = 256


class ExactRows:
    """Tokens of one head as they came, float32 [length, head_dim]; memory grows ahead of them."""

    def __init__(self, rows: Tensor) -> None:
        self.length = 0
        self._memory = rows.new_empty(0, rows.shape[-1], dtype=torch.float32)
        self.append(rows)

    def append(self, rows: Tensor) -> None:
        end = self.length + len(rows)
        if end > len(self._memory):
            grown = self._memory.new_empty(end + max(_SPARE, end // 8), self._memory.shape[1])
            grown[: self.length] = self._memory[: self.length]
            self._memory = grown
        self._memory[self.length : end] = rows
        self.length = end

    def truncate(self, length: int) -> None:
        self.length = length

    @property
    def rows(self) -> Tensor:
        return self._memory[: self.length]


class Watch:
    """A monitor at work on one layer of one cache.

    Attributes:
        record: the last rows, float32 [RECORD, columns].
        looks: how many rows there were.
        steps: of the model since it began.
        held: exact keys and values of the head.
    """

    def __init__(self, monitor: Monitor, layer: int | None, held: tuple[ExactRows, ExactRows]) -> None:
        self.monitor, self.layer, self.held = monitor, layer, held
        self.record: Tensor | None = None
        self.looks = self.steps = 0
        self._state: tuple[Tensor, ...] = ()

    @property
    def looks_now(self) -> bool:
        return self.steps % self.monitor.every == 0

    def see(self, moment: Moment) -> None:
        if self.record is None:
            self._state = self.monitor.state(moment)
            self.record = moment.query.new_zeros(RECORD, len(self.monitor.columns))
        row, self._state = self.monitor.observe(moment, self._state)
        self.record[self.looks % RECORD] = row
        self.looks += 1

    def rows(self) -> Tensor:
        """Those that the record still has, oldest first, on the CPU."""
        if self.record is None:
            return torch.zeros(0, len(self.monitor.columns))
        if self.looks <= RECORD:
            return self.record[: self.looks].cpu()
        return self.record.roll(-(self.looks % RECORD), 0).cpu()


@dataclass(frozen=True)
class Seen:
    """What one monitor saw.

    Attributes:
        monitor: its name with its parameters.
        layer, head: where it looked.
        looks: how often.
        columns: its numbers by name, the last ones of each look.
        warning: what is wrong; None if nothing is.
    """

    monitor: str
    layer: int | None
    head: int
    looks: int
    columns: dict[str, list[float]]
    warning: str | None

    def __str__(self) -> str:
        where = f"{self.monitor} at head {self.head} of layer {self.layer}, {self.looks} looks"
        last = ", ".join(f"{name} {values[-1]:.3g}" for name, values in self.columns.items() if values)
        return f"{where}: {self.warning or 'nothing wrong'}" + (f" (last: {last})" if last else "")


def monitor(cache: Any) -> Seen:
    """What the option `monitor` saw of a cache. This waits for the device; the steps before did not.

    Args:
        cache: as the model gave it back.

    Raises:
        ValueError: if nothing watched it: no option `monitor`, or no growing packed cache of full attention.
    """
    for keys in _keys(cache):
        watch = keys.packed_storage.watch
        if isinstance(watch, Watch):
            rows = watch.rows()
            columns = {name: rows[:, i].tolist() for i, name in enumerate(watch.monitor.columns)}
            warning = watch.monitor.judge(rows) if len(rows) else None
            return Seen(str(watch.monitor), watch.layer, watch.monitor.head, watch.looks, columns, warning)
    raise ValueError(
        "cache was not watched: compile the model with the option monitor (one of `tqc plugins`) and decode at least a "
        "token; caches that are preallocated or slide are not watched"
    )


def _keys(cache: Any) -> Iterator[PackedTensor]:
    halves = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers: Sequence[Any] = cache if isinstance(cache, (list, tuple)) else []
    for half in [half for half in halves if half is not None] or [cache]:
        layers = [*layers, *getattr(half, "layers", [])]
    for layer in layers:
        keys = layer[0] if isinstance(layer, (list, tuple)) and layer else getattr(layer, "keys", None)
        if isinstance(keys, PackedTensor):
            yield keys
