"""One attention site: what every finder fills in."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from tqc.ops import example
from tqc.passes.graph import layer_name, strip_repeat


@dataclass(frozen=True)
class Mask:
    """What is added to the scores of one site, or decides which of them count.

    Attributes:
        node: broadcastable to [batch, query_heads, n, columns].
        kind: "keep" for bool where True attends, "drop" for bool where True does not, "add" for float; "flex" where
            `node` is a `flex_attention` whose mask is still a function.
        factor: what is added is this times `node`, but nothing that it masks becomes visible.
        flat: whether `node` is [batch * query_heads, n, columns].
    """

    node: Node
    kind: str
    factor: float = 1.0
    flat: bool = False


@dataclass
class Attention:
    """One attention site.

    Attributes:
        output: the node that holds the result, [batch, query_heads, n, head_dim] or [batch * query_heads, n, head_dim].
        query: of either shape as well.
        key, value: before the repetition of grouped heads, [batch, heads, tokens, head_dim].
        masks: applied after scale and softcap, all of them.
        sinks: node of one logit per query head, or None.
        reason: why the site is not understood (then the fields before it may not say all), or None.
        heads: query heads; 0 where the site is not understood.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    masks: tuple[Mask, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Node | None = None
    is_causal: bool = False
    reason: str | None = None
    heads: int = 0

    @property
    def name(self) -> str:
        return layer_name(self.output)


def strip_heads(site: Attention) -> None:
    """Undo the repetition of grouped heads, which must be the same for keys and values."""
    site.heads = site.heads or example(site.query).shape[1]
    key, k_repeat = strip_repeat(site.key, site.heads)
    val, v_repeat = strip_repeat(site.value, site.heads)
    if k_repeat != v_repeat:
        site.reason = f"keys are repeated {k_repeat} times and values {v_repeat} times"
    else:
        site.key, site.value = key, val
