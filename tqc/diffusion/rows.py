"""From what a schedule asks of a step to what a call does, by the states that there are."""

from __future__ import annotations

from tqc.diffusion.plan import OTHER as OTHER_BRANCH
from tqc.diffusion.plan import SOURCES, Cell, Schedule
from tqc.diffusion.state import Branch, Generation
from tqc.diffusion.variants import FULL, HALF, OTHER, Action, Call
from tqc.passes.rewrites.step_state import BLOCK
from tqc.plugins.step_strategy import Progress

# What diffusers' pipelines call the branches of classifier-free guidance in `cache_context`.
BRANCHES = ("cond", "uncond")


def weight_of(generation: Generation) -> float:
    """What an error of this step counts, by the scheduler of the pipeline; 1 where that does not say."""
    weights = generation.scope.weights() if generation.scope else ()
    timesteps = generation.scope.timesteps() if generation.scope else None
    step = generation.step
    if timesteps is not None and generation.timestep in (times := timesteps.tolist()):
        step = times.index(generation.timestep)  # a second transformer begins behind the first
    return weights[step] if step < len(weights) else 1.0


def progress_of(generation: Generation, branch: Branch, schedule: Schedule) -> Progress:
    """Where a branch stands before the step that it is called for."""
    weight = weight_of(generation) if schedule.scorer else 1.0
    last, *before = branch.computed or [generation.step]
    gap = last - before[0] if before else 1
    return Progress(generation.step, generation.step - last, gap, branch.errors, branch.change, weight)


def wanted(schedule: Schedule, generation: Generation, layer: int) -> dict[str, int]:
    """Of how many steps a layer's states will be read behind this step."""
    timesteps = generation.scope.timesteps() if generation.scope else None
    if timesteps is not None and generation.step + 1 >= len(timesteps):
        return {}
    return dict(schedule.wanted(generation.step, layer))


def row_of(call: Call, schedule: Schedule, cells: tuple[Cell, ...], halves: bool, probed: bool) -> tuple[Action, ...]:
    """What a call does with each layer.

    Args:
        halves: whether its batch is of both branches of the guidance.
        probed: whether the first block has been computed for this step already.
    """
    generation, name, other = call
    branch, row = generation.branch(name), []
    for layer, cell in enumerate(cells):
        what, order = SOURCES[cell.step]
        terms = 0 if what == FULL else min(order + 1, branch.steps(layer, what))
        if probed and layer == 0 and branch.steps(0, BLOCK):
            row.append(Action(BLOCK))
        elif terms:
            row.append(Action(what, terms))
        else:
            keep = tuple(sorted(what for what, count in wanted(schedule, generation, layer).items() if count))
            guidance, lend = FULL, False
            if cell.guidance == OTHER_BRANCH:
                if other is not None:
                    guidance = OTHER if layer in generation.lent else FULL
                elif name in BRANCHES:
                    lend = True
                elif halves:
                    guidance = HALF
            row.append(Action(keep=keep, guidance=guidance, lend=lend))
    return tuple(row)


def probe_row(schedule: Schedule, generation: Generation, branch: Branch) -> tuple[Action, ...] | None:
    """The first block computed and all others taken from before; None where there is nothing before."""
    if not branch.steps(0, BLOCK):
        return None
    row = [Action(keep=(BLOCK,))]
    for layer in range(1, schedule.layers):
        terms = min(schedule.wanted(generation.step, layer).get(BLOCK, 0), branch.steps(layer, BLOCK))
        row.append(Action(BLOCK, terms) if terms else Action())
    return tuple(row)
