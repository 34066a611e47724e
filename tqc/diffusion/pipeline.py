"""`tqc.compile_pipeline`: the transformers of a diffusers pipeline, compiled by a plan or a strategy."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from tqc.config import Config
from tqc.diffusion.dispatcher import Dispatcher, dispatcher_of
from tqc.diffusion.plan import Plan, make_schedule
from tqc.diffusion.sigmas import check_scheduler, step_weights
from tqc.diffusion.state import STATE_BITS, Scope
from tqc.optimized_module import SHARING

# A pipeline with two has one for the noisy steps and one for the rest.
TRANSFORMERS = ("transformer", "transformer_2")


def compile_pipeline(
    pipe: Any,
    *,
    strategy: str | None = None,
    strategy_kwargs: Mapping[str, Any] | None = None,
    scorer: str | None = None,
    cfg_sharing: bool = False,
    skip_layers: Iterable[int] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
    state_bits: int | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> None:
    """Compile the transformers of `pipe` in place; its calls then share attention as `strategy` or `plan` says.

    Args:
        pipe: of diffusers, with a `transformer` (and maybe a `transformer_2`) made of lists of blocks.
        strategy: what is computed in which steps: "share", "taylor", "delta", "delta2", "window" or "first_block", with
            `strategy_kwargs` (`tqc plugins` says which); None computes everything in all.
        scorer: "snr" weighs the errors that delta, delta2 and first_block count, by the scheduler's sigmas.
        cfg_sharing: compute self-attention for one branch of classifier-free guidance only, and use it for both. Joint
            attention and cross-attention carry the prompt, and are computed for both.
        skip_layers: layers that compute everything; negative from the last. Layers are the blocks of the transformer,
            in the order of its module lists.
        plan: a `Plan`, or the path of its file, in place of `strategy` and `cfg_sharing`.
        state_bits: 8, 4 or 2 to keep what is shared packed; None to keep it as it is.
        options: of the backend, `{"rest": "eager"}` among them.
        dynamic: as in `torch.compile`.

    Raises:
        ValueError, TypeError: for a pipeline without a transformer, or an argument that does not fit; the pipeline is
            as it was.
    """
    transformers = {name: found for name in TRANSFORMERS if (found := getattr(pipe, name, None)) is not None}
    if not isinstance(transformers.get("transformer"), torch.nn.Module):
        raise ValueError(f"pipe must have a transformer, and {type(pipe).__name__} has none")
    if plan is not None and len(transformers) > 1:
        raise ValueError("a plan is for one transformer, and this pipeline has two: give a strategy")
    if scorer is not None:
        check_scheduler(getattr(pipe, "scheduler", None))
    made = [
        make_dispatcher(
            transformer,
            strategy=strategy,
            strategy_kwargs=strategy_kwargs,
            scorer=scorer,
            cfg_sharing=cfg_sharing,
            skip_layers=skip_layers,
            plan=plan,
            state_bits=state_bits,
            options=options,
            dynamic=dynamic,
        )
        for transformer in transformers.values()
    ]
    for dispatcher in made:
        dispatcher.install()
    if not hasattr(type(pipe), "_tqc_original"):
        pipe.__class__ = _scoped(type(pipe))


def decompile_pipeline(pipe: Any) -> None:
    """Undo `compile_pipeline`; a pipeline that was not compiled stays as it is."""
    for name in TRANSFORMERS:
        if dispatcher := dispatcher_of(getattr(pipe, name, None)):
            dispatcher.remove()
    pipe.__class__ = getattr(type(pipe), "_tqc_original", type(pipe))


def compile_transformer(transformer: torch.nn.Module, options: Mapping[str, Any]) -> Dispatcher:
    """What `transformer.compile(backend="tqai", options=...)` lets its calls go through: the arguments of
    `compile_pipeline` are among the options there.

    Raises:
        ValueError, TypeError: as `compile_pipeline`; also for a scorer, which needs the pipeline's scheduler.
    """
    if options.get("scorer") is not None:
        raise ValueError(
            f"scorer reads the scheduler of a pipeline, so give it to tqc.compile_pipeline; got {options['scorer']!r}"
        )
    sharing = {name: value for name, value in options.items() if name in SHARING}
    rest = {name: value for name, value in options.items() if name not in SHARING}
    dispatcher = make_dispatcher(transformer, **sharing, options=rest)
    dispatcher.install()
    return dispatcher


def make_dispatcher(
    transformer: torch.nn.Module,
    *,
    state_bits: int | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **sharing: Any,
) -> Dispatcher:
    """The dispatcher of a transformer, not yet installed; arguments as `compile_pipeline` has them.

    Raises:
        ValueError, TypeError: as `compile_pipeline`.
    """
    if state_bits is not None and state_bits not in STATE_BITS:
        raise ValueError(f"state_bits must be one of {', '.join(map(str, STATE_BITS))}, or None; got {state_bits!r}")
    Config.from_options(options)
    if "timestep" not in inspect.signature(transformer.forward).parameters:
        raise ValueError(f"the transformer must take a timestep, and {type(transformer).__name__} takes none")
    blocks = blocks_of(transformer)
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks with attention in them")
    schedule = make_schedule(type(transformer).__name__, len(blocks), **sharing)
    return Dispatcher(transformer, schedule, blocks, state_bits, options or {}, dynamic)


def blocks_of(transformer: torch.nn.Module) -> list[str]:
    """Paths of a transformer's layers: the elements of its module lists that have attention inside."""
    return [
        f"{name}.{number}"
        for name, child in transformer.named_children()
        if isinstance(child, torch.nn.ModuleList)
        for number, block in enumerate(child)
        if any("attention" in type(module).__name__.lower() for module in block.modules())
    ]


def _scoped(cls: type) -> type:
    """A subclass of a pipeline's class whose calls begin and end the state of its transformers."""
    original: Callable[..., Any] = cls.__call__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        with generations_of(self, bound.arguments):
            return original(self, *args, **kwargs)

    names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "_tqc_original": cls})


@contextlib.contextmanager
def generations_of(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """A generation for each compiled transformer of a pipeline that is called with these arguments."""
    weights = functools.cache(functools.partial(step_weights, pipe))
    scope = Scope(functools.partial(_guided, pipe, arguments), functools.partial(_timesteps, pipe), weights)
    with contextlib.ExitStack() as stack:
        for name in TRANSFORMERS:
            if dispatcher := dispatcher_of(getattr(pipe, name, None)):
                stack.enter_context(dispatcher.generation(scope))
        yield


def _guided(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:  # pipelines that do not say so guide from this scale on
        scale = arguments.get("guidance_scale")
        return isinstance(scale, (int, float)) and scale > 1
    return bool(guided)


def _timesteps(pipe: Any) -> torch.Tensor | None:
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) else None
