"""What the compiler found in a model, what it did with it, and why not more."""

from __future__ import annotations

from tqc.passes.plan import Plan

_plans: list[Plan] = []


def record(plan: Plan) -> None:
    _plans.append(plan)
