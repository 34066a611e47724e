"""What the command line gets, checked: options, models, texts. Each mistake is one line."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


class BadInput(typer.BadParameter):
    """Input that cannot be used; the message is the one line that the user sees."""

    def format_message(self) -> str:
        return self.message


def given_options(
    bits_k: int | None = None,
    bits_v: int | None = None,
    preset: str | None = None,
    sink_tokens: int | None = None,
    residual_window: int | None = None,
    widths: str | None = None,
    budget_bits: float | None = None,
    strategy: str | None = None,
    scorer: str | None = None,
    keep: float | None = None,
    skip_layers: str | None = None,
    tiers: str | None = None,
    scorer_kwargs: str | None = None,
    monitor: str | None = None,
    config: str | None = None,
) -> dict[str, Any]:
    """The backend's options that were given, checked before anything slow starts."""
    given = {
        "bits_k": bits_k,
        "bits_v": bits_v,
        "preset": preset,
        "sink_tokens": sink_tokens,
        "residual_window": residual_window,
        "widths": widths,
        "budget_bits": budget_bits,
        "strategy": strategy,
        "scorer": scorer,
        "keep": keep,
        "skip_layers": None if skip_layers is None else _layers(skip_layers),
        "tiers": tiers,
        "scorer_kwargs": None if scorer_kwargs is None else _parameters(scorer_kwargs),
        "monitor": monitor,
    }
    options = _of_file(config) | {name: value for name, value in given.items() if value is not None}
    from tqc.config import Config
    from tqc.widths import WidthsFileError

    try:
        Config.from_options(options)
    except WidthsFileError as error:
        raise BadInput(f"--widths: {error}") from None
    except (ValueError, TypeError) as error:
        message = str(error)
        for name in given:  # not in the name of a file
            message = re.sub(rf"(?<![\w./'-]){name}(?![\w./-])", flag(name), message)
        raise BadInput(message) from None
    return options


def _of_file(config: str | None) -> dict[str, Any]:
    """The options of the best trial that `tqc search` wrote."""
    if config is None:
        return {}
    try:
        found = json.loads(Path(config).read_text("utf-8"))["options"]
        assert isinstance(found, dict)
    except OSError as error:
        raise BadInput(f"--config {config!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise BadInput(
            f"--config {config!r} is no file of `tqc search`: it must hold a JSON object `options`"
        ) from None
    return found


def _parameters(text: str) -> dict[str, Any]:
    try:
        parts = [part.split("=", 1) for part in text.split(",")]
        return {name.strip(): ast.literal_eval(value.strip()) for name, value in parts}
    except (ValueError, SyntaxError):
        raise BadInput(f"--scorer-kwargs must read as name=value,name=value, as queries=16; got {text!r}") from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--skip-layers must be numbers of layers, as 0,1,-1; got {text!r}") from None


def text_of(file: str | None) -> str | None:
    """What the file of --text holds."""
    try:
        return Path(file).read_text("utf-8") if file else None
    except UnicodeDecodeError as error:
        raise BadInput(f"--text {file!r} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise BadInput(f"--text {file!r} cannot be read: {error.strerror}") from None


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def load(model: str | None, dtype: str, backend: str = "torch") -> tuple[Any, Any]:
    """Model and tokenizer, on the GPU if there is one; for the backend "mlx", a model of mlx-lm."""
    from tqc import models

    if dtype not in models.DTYPES:
        raise BadInput(f"--dtype must be one of {', '.join(models.DTYPES)}; got {dtype!r}")
    try:
        models.quiet_transformers()
        if backend == "mlx":
            return models.load_mlx(model, dtype)
        loaded, tokenizer = models.load(model, dtype)
    except models.ModelError as error:
        raise BadInput(str(error)) from None
    import torch

    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_with_prompt(
    model: str | None, dtype: str, prompt: str, backend: str = "torch"
) -> tuple[Any, Any, dict[str, Any]]:
    if not prompt.strip():
        raise BadInput("PROMPT is empty: give some text")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python keeps bytes of arguments that it cannot decode as lone surrogates
        raise BadInput(f"PROMPT is not UTF-8: {prompt.encode(errors='surrogateescape')!r}") from None
    loaded, tokenizer = load(model, dtype, backend)
    from tqc.models import encode

    return loaded, tokenizer, {name: tensor.to(loaded.device) for name, tensor in encode(tokenizer, prompt).items()}


@contextmanager
def fitting_widths() -> Iterator[None]:
    """One line where the file of --widths is another model's, which the compiler finds out."""
    from tqc.widths import OtherModelError

    try:
        yield
    except Exception as error:
        found = getattr(error, "inner_exception", error)  # dynamo wraps what a backend raises
        if isinstance(found, OtherModelError):
            raise BadInput(str(found)) from None
        raise


def ways_of(backend: str) -> Any:
    """The module that compiles, generates and compares."""
    return importlib.import_module("tqc.cli.generate_mlx" if backend == "mlx" else "tqc.cli.generate")


@contextmanager
def fitting_options(backend: str) -> Iterator[None]:
    """One line for an option that this backend has not."""
    try:
        yield
    except ValueError as error:
        if backend == "torch":
            raise
        raise BadInput(f"{error} (--backend {backend})") from None
