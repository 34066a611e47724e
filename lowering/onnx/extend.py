"""`extend` as an ONNX function: tokens behind those of a cache, and pages of what leaves the recent window."""

from __future__ import annotations

from onnx import FunctionProto

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.onnx.balance import balance
from tqc.lowering.onnx.builder import Body, Value
from tqc.lowering.onnx.encode import Tables, encode, head_rows, table_inputs
from tqc.lowering.onnx.layout import paged_names, part_names
from tqc.lowering.onnx.places import Places, begin_at, later_state, packed_at


def extend_function(name: str, fmt: PackedFormat, balanced: bool) -> FunctionProto:
    """`(new, state, after, [query], *tables, *parts) -> *parts`, see `tqc.ops.extend`.

    `after` is anything that must have been computed before the cache's memory is written: what reads the cache as it
    was.

    Args:
        balanced: whether there is a `query`, by which the keys' channels are balanced when the first page is packed.
    """
    body = Body(name)
    new, state, after = (body.input(given) for given in ("new", "state", "after"))
    query = body.input("query") if balanced else None
    tables = table_inputs(body, fmt, "table")
    parts = {part: body.input(part) for part in part_names(fmt)}
    made = _Extension(body, fmt, tables, parts, new, behind(body, state, after), query).parts()
    return body.function({f"{part}_present": value for part, value in made.items()})


def state_function(name: str, fmt: PackedFormat) -> FunctionProto:
    """`(new, state) -> state` when the tokens `new` [batch, heads, n, d] have come."""
    body = Body(name)
    new, state = body.input("new"), body.input("state")
    return body.function({"state_present": later_state(body, state, body.size(new, 2), fmt)})


def behind(body: Body, x: Value, *others: Value) -> Value:
    """`x`, int64, once `others` have been computed: the least of zero and their sizes is added."""
    for other in others:
        x = x + body.min(0, body.op("Size", other))
    return x


class _Extension:
    def __init__(
        self,
        body: Body,
        fmt: PackedFormat,
        tables: Tables,
        past: dict[str, Value],
        new: Value,
        state: Value,
        query: Value | None,
    ) -> None:
        self.body, self.fmt, self.tables, self.past, self.new, self.query = body, fmt, tables, past, new, query
        self.places = Places(body, state, fmt)
        zero, sink_tokens = body.ints(0), body.ints(fmt.sink_tokens)
        count = body.size(new, 2)
        self.batch = body.size(new, 0)
        self.end = self.places.length + count
        self.packed_after = packed_at(body, self.places.packed, self.end, fmt)
        self.taken = body.max(zero, body.min(sink_tokens - self.places.length, count))
        # Packed index of the first new token that is no sink; negative where there is none.
        self.first = self.places.length + self.taken - sink_tokens
        self.rest = body.slice(new, self.taken, count, 2)

    def parts(self) -> dict[str, Value]:
        body, fmt, places, past, batch = self.body, self.fmt, self.places, self.past, self.batch
        made = dict(past)
        if fmt.sink_tokens:
            sinks = body.slice(self.new, 0, self.taken, 2)
            at = body.min(places.length, body.ints(fmt.sink_tokens))
            made["sinks"] = body.scatter(past["sinks"], sinks, at, batch)
        names = paged_names(fmt)
        page = body.floor_div(self._first_kept(), PAGE_TOKENS)
        fresh = body.branch(self.packed_after > places.packed, lambda: self._encoded(names), lambda: self._none(names))
        if fmt.centred:
            *fresh, made["head"] = fresh
        for name, update in zip(names, fresh, strict=True):
            at = page % body.size(past[name], 2) if fmt.keep is not None else page
            made[name] = body.scatter(past[name], update, at, batch, circular=fmt.keep is not None)
        start = body.max(self.first, self.packed_after)
        kept = body.slice(self.rest, body.max(body.ints(0), self.packed_after - self.first), body.size(self.rest, 2), 2)
        at = behind(body, start % fmt.residual_window, fresh[0])
        made["window"] = body.scatter(past["window"], kept, at, batch, circular=True)
        return made

    def _first_kept(self) -> Value:
        """Packed index of the first token that may be packed now: pages of dropped tokens are not stored."""
        body, fmt, places = self.body, self.fmt, self.places
        begin = begin_at(body, places.begin, self.end, fmt)
        return body.min(body.max(places.packed, begin - body.ints(fmt.sink_tokens)), self.packed_after)

    def _tokens(self, start: Value, end: Value) -> Value:
        """Those of packed indices `start` to `end`, from the ring and the new ones."""
        body, zero = self.body, self.body.ints(0)
        old = body.arange(start, body.max(start, body.min(self.first, end))) % self.fmt.residual_window
        fresh = body.slice(self.rest, body.max(zero, start - self.first), body.max(zero, end - self.first), 2)
        return body.concat(body.gather(self.past["window"], old, 2), fresh, axis=2)

    def _encoded(self, names: list[str]) -> list[Value]:
        body, fmt = self.body, self.fmt
        head = self._head() if fmt.centred else None
        start = body.floor_div(self._first_kept(), PAGE_TOKENS) * PAGE_TOKENS
        made = encode(body, self._tokens(start, self.packed_after), head, fmt, self.tables)
        return [made[name] for name in names] + ([head] if head else [])

    def _none(self, names: list[str]) -> list[Value]:
        body = self.body
        empty = [body.slice(self.past[name], 0, 0, 2) for name in names]
        return empty + ([self.past["head"]] if self.fmt.centred else [])

    def _head(self) -> Value:
        """The head's centre and balance, chosen with the first page."""
        body, fmt, past = self.body, self.fmt, self.past

        def chosen() -> list[Value]:
            if self.query is None:
                scale = body.float(body.slice(past["head"], 1, 2, 2))
            else:
                keys = body.concat(*self.places.dense_rows(past["sinks"], past["window"]), self.new, axis=2)
                scale = balance(body, keys, self.query, body.size(self.new, 1), fmt.head_dim)
            first = self._tokens(body.ints(0), body.ints(PAGE_TOKENS))
            return [head_rows(body, first, scale, fmt, self.tables)]

        return body.branch(body.op("Equal", self.places.packed, 0), chosen, lambda: [past["head"]])
