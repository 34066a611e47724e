"""`tqc.export_onnx`: a model with packed caches as a file that plain onnxruntime runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tqc.config import OFF, Config
from tqc.export.capture import Captured, ExportError, capture
from tqc.export.metadata import DATA_FILE, METADATA, MODEL_FILE
from tqc.format.packed import FORMAT_VERSION
from tqc.ops import example
from tqc.passes.plan import DENSE, Plan
from tqc.torch_private import get_compiled

log = logging.getLogger(__name__)

OPSET = 24
PACKAGES = ("onnx", "onnxscript", "transformers")


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    name: str | None = None,
    max_cache_len: int = 4096,
    opset: int = OPSET,
    inline: bool = False,
    strict: bool = False,
    compress: bool = True,
    preset: str | None = None,
    on_step: Callable[[str], None] | None = None,
    **options: Any,
) -> Path:
    """Write a decoder of transformers as one ONNX graph, for prompts and for single tokens, with its packed caches as
    inputs and outputs (see `tqc.lowering.onnx.layout` for their names and shapes).

        input_ids       int64 [batch, sequence]     new tokens; prompts of a batch are padded on the left
        attention_mask  int64 [batch, total]        1 for tokens that count, past ones included
        logits_to_keep  int64 [kept]                which of the new tokens get logits
        logits          [batch, kept, vocabulary]

    A host binds `past.` and `present.` to one buffer, all but the states: nothing is copied then.

    Args:
        model: in eval mode, on the CPU.
        path: of a folder that is empty or does not exist; it appears when all is written: model.onnx, its weights in
            model.onnx.data, the configuration and, if given, the tokenizer.
        name: of the model, for the file's metadata; its path or its class if None.
        max_cache_len: most tokens that a sequence may have.
        opset: of the graph, at least 24.
        inline: write the dialect's functions out where they are called.
        strict: raise where a cache stays dense; else it is said once.
        compress: False for dense caches, which grow.
        preset, options: as `options` of torch.compile (see `tqc.Config`).
        on_step: hears what is being done.

    Returns:
        The folder.

    Raises:
        ExportError: for a model, a folder or an option that cannot serve; the message is one line.
        ValueError, TypeError: for options of the compiler that do not fit.
    """
    say = on_step or (lambda text: None)
    folder = Path(path)
    _check(model, folder, max_cache_len, opset)
    config = Config(bits_k=OFF, bits_v=OFF)
    if compress:
        config = Config.from_options({**({"preset": preset} if preset else {}), **options})
    elif options or preset:
        raise ExportError(f"compress=False leaves all caches dense, so it takes no {next(iter(options), 'preset')}")
    for name in ("strategy", "monitor"):
        if (value := getattr(config, name)) is not None:
            raise ExportError(f"{name} is an option of the torch backend alone; got {value!r}")
    say("tracing")
    captured = capture(model, config)
    if captured.plan:
        _report_dense(captured.plan, strict)
    from tqc.export.step import Step

    step = Step(captured, max_cache_len)
    say("converting to ONNX")
    exported = _convert(step, captured, opset)
    say("writing")
    with _beside(folder) as unfinished:
        _save(
            exported, step, unfinished, inline, _metadata(model, name, step, captured, max_cache_len) | _chat(tokenizer)
        )
        model.config.save_pretrained(unfinished)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
    return folder


def _check(model: Any, folder: Path, max_cache_len: int, opset: int) -> None:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"{package} is not installed: pip install 'tqai-compiler[onnx]' transformers")
    if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
        raise ExportError(f"max_cache_len must be a positive number of tokens, got {max_cache_len!r}")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OPSET:
        raise ExportError(f"opset must be at least {OPSET}, which has TensorScatter; got {opset!r}")
    if folder.is_dir() and any(folder.iterdir()):
        raise ExportError(f"path {str(folder)!r} is a folder that is not empty")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"path {str(folder)!r} exists and is no folder")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise ExportError(f"path {str(folder)!r} cannot be written: there is no folder {str(parent)!r}")
    if not os.access(parent, os.W_OK):
        raise ExportError(f"path {str(folder)!r} cannot be written: {str(parent)!r} is read-only")
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ExportError(f"model must be one of transformers that generates, got {type(model).__name__}")
    if get_compiled(model) is not None or hasattr(model, "_orig_mod"):
        raise ExportError("model is compiled already: give it as it was loaded")
    if model.device.type != "cpu":
        raise ExportError(f"model must be on the CPU, it is on {model.device}")


def _report_dense(plan: Plan, strict: bool) -> None:
    dense = plan.with_action(DENSE)
    if not dense:
        return
    sites = "; ".join(f"layer {site.layer}: {site.reason}" for site in dense[:3])
    text = f"{len(dense)} of {len(plan.sites)} caches of {plan.model} stay dense ({sites})"
    if strict:
        raise ExportError(f"strict: {text}")
    log.warning("%s", text)


def _convert(step: Any, captured: Captured, opset: int) -> Any:
    """The step as a program of torch.onnx."""
    names = ["input_ids", "attention_mask", "logits_to_keep", *step.names]
    arguments, shapes = _examples(step, captured)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)  # it tells of packages that are not needed
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)
            return torch.onnx.export(
                program,
                input_names=names,
                output_names=step.realized.outputs,
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"torch.onnx cannot export {captured.name}: {line}") from error
    finally:
        exporter.setLevel(level)


def _examples(step: Any, captured: Captured) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example inputs of the step, and which of their sizes vary."""
    sizes = captured.sizes
    batch, count, total = sizes["batch"], sizes["sequence"], sizes["past"] + sizes["sequence"]
    dim = {name: torch.export.Dim(name) for name in ("batch", "sequence", "kept", "past", "window")}
    dim["total"] = torch.export.Dim("total", min=4)  # torch knows no smaller one; the graph takes any
    arguments: list[Any] = [torch.ones(batch, size, dtype=torch.int64) for size in (count, total)]
    arguments.append(torch.zeros(2, dtype=torch.int64))
    shapes: list[Any] = [
        {0: dim["batch"], 1: dim["sequence"]},
        {0: dim["batch"], 1: dim["total"]},
        {0: dim["kept"]},
    ]
    cache_shapes: list[Any] = []
    for name, node in step.given.items():
        held = captured.held.get(node, example(node))
        if held.dim() < 2:
            arguments.append(torch.zeros_like(held))
            cache_shapes.append(None)
            continue
        arguments.append(torch.zeros(batch, *held.shape[1:], dtype=held.dtype))
        varying = {0: dim["batch"]}
        if name in step.dense:
            varying[2] = dim["past" if step.dense[name][1].window is None else "window"]
        cache_shapes.append(varying)
    return tuple(arguments), (*shapes, tuple(cache_shapes))


def _save(exported: Any, step: Any, folder: Path, inline: bool, metadata: dict[str, Any]) -> None:
    import onnx
    import onnx_ir

    from tqc.export.repeat import expand

    model = exported.model
    expand(model)
    for function in step.realized.functions.values():
        made = onnx_ir.serde.deserialize_function(function)
        model.functions[made.identifier()] = made
    model.opset_imports["tqc"] = metadata["domain_version"]
    model.producer_name, model.producer_version = "tqc", _version()
    model.metadata_props[METADATA] = json.dumps(metadata)
    for value in list(model.graph.initializers.values()):
        name = value.name.removeprefix("model.")
        value.name = step.realized.tables.get(name, name)
    if inline:
        import onnx.inliner

        # Weights stay out of the way: the inliner takes a whole file in memory.
        onnx_ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE)
        flat = onnx.inliner.inline_local_functions(onnx.load(folder / MODEL_FILE, load_external_data=False))
        onnx.save(flat, folder / MODEL_FILE)
    else:
        onnx_ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE)


def _metadata(model: Any, name: str | None, step: Any, captured: Captured, max_cache_len: int) -> dict[str, Any]:
    """What a reader must know: versions, caches and their tensors."""
    from tqc.lowering.onnx.builder import DOMAIN_VERSION

    realized = step.realized
    packed = [
        {
            "name": cache.name,
            "spec": cache.fmt.spec,
            "state": cache.state,
            "dtype": _name(cache.dtype),
            "parts": {part.name: [part.dtype or _name(cache.dtype), *part.shape] for part in cache.layout},
        }
        for cache in realized.caches
    ]
    dense = []
    for full, (node, role) in step.dense.items():
        held = captured.held[node]
        dense.append(
            {
                "name": full.removeprefix("past."),
                "dtype": _name(held.dtype),
                "heads": held.shape[1],
                "head_dim": held.shape[3],
                "window": role.window,
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "domain_version": DOMAIN_VERSION,
        "tqc_version": _version(),
        "torch_version": torch.__version__,
        "model": name or getattr(model, "name_or_path", "") or type(model).__name__,
        "architecture": type(model).__name__,
        "dtype": _name(model.dtype),
        "eos_token_id": getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        "max_cache_len": max_cache_len,
        "packed": packed,
        "dense": dense,
        "states": list(realized.states),
    }


def _chat(tokenizer: Any) -> dict[str, Any]:
    """What a chat template puts around a user's turn, for those who have no template engine."""
    if not getattr(tokenizer, "chat_template", None):
        return {}
    mark = "\ufffcTURN\ufffc"
    turns = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, found, after = text.partition(mark)
    return {"chat": [before, after]} if found else {}


def _version() -> str:
    return importlib.metadata.version("tqai-compiler")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which gets its name when the block is done; nothing is left of it otherwise."""
    unfinished = folder.absolute().parent / f".tqc-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir()
        yield unfinished
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        raise ExportError(f"path {str(folder)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
