"""`tqc.OnnxGenerator`: generates with an exported model. Needs onnxruntime and, for text, tokenizers; never torch."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tqc.export.metadata import MODEL_FILE, ModelFileError, read_metadata
from tqc.export.sampling import Sampling


class OnnxGenerator:
    """A model that `tqc.export_onnx` wrote, with a cache of its own.

    The cache's tensors are allocated once, for `max_cache_len` tokens, and bound as inputs and as outputs: a step
    writes what is new and copies nothing. `generate` starts anew; `step` goes on.

    Attributes:
        metadata: what the file tells of itself.
        cache: arrays by name (`3.key.plane2`, `state`); those of dense caches grow.

    Raises:
        ModelFileError: if there is no such model, or if it is newer than this package.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModelFileError("onnxruntime is not installed: pip install 'tqai-compiler[onnx]'")
        import onnxruntime

        self.path = Path(path)
        file = self.path / MODEL_FILE
        if not file.is_file():
            raise ModelFileError(f"{str(file)!r}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelFileError(f"{str(file)!r} does not load: {str(error).splitlines()[0]}") from error
        self.metadata = read_metadata(self.session.get_modelmeta().custom_metadata_map, file)
        self.max_cache_len: int = self.metadata["max_cache_len"]
        self.reset(1)

    def reset(self, batch: int) -> None:
        """An empty cache for `batch` sequences."""
        self.batch, self.length = batch, 0
        self.mask = np.zeros((batch, 0), np.int64)
        self._values: dict[str, Any] = {}
        self._binding = self.session.io_binding()
        self._outputs: list[str] = []
        for cache in self.metadata["packed"]:
            for part, (dtype, *shape) in cache["parts"].items():
                held = np.zeros((batch, *shape), dtype)
                if part == "head":
                    held[:, :, 1] = 1  # the balance
                self._bind(f"{cache['name']}.{part}", held)
        for cache in self.metadata["dense"]:
            empty = np.zeros((batch, cache["heads"], 0, cache["head_dim"]), cache["dtype"])
            self._values[cache["name"]] = self._value(empty)
        # Two of each state: others still read the old one when the new one is written.
        self._states = {
            name: [self._value(np.zeros(3, np.int64)) for _ in range(2)] for name in self.metadata["states"]
        }
        # In the order in which `step` binds them.
        later = [*self._states, *(cache["name"] for cache in self.metadata["dense"])]
        self._outputs += [*(f"present.{name}" for name in later), "logits"]

    def fork(self) -> OnnxGenerator:
        """Another generator of the same model and session that holds the same tokens in memory of its own."""
        other, held = copy.copy(self), self.cache
        dense = [cache["name"] for cache in self.metadata["dense"]]
        parts = {name: held[name].copy() for name in self._values if name not in dense}
        other.restore(parts, {name: held[name].copy() for name in self._states}, self.mask)
        other._values |= {name: self._value(held[name].copy()) for name in dense}
        return other

    def __deepcopy__(self, memo: Any) -> OnnxGenerator:
        return self.fork()

    def restore(self, parts: dict[str, np.ndarray], states: dict[str, np.ndarray], mask: np.ndarray) -> None:
        """Put tokens into the cache that another one held (see `tqc.export.cache_file`).

        Args:
            parts: tensors of packed caches, by name.
            states: by name.
            mask: int64 [batch, tokens], 0 for padding.
        """
        self.reset(mask.shape[0])
        for name, array in parts.items():
            self._values[name].update_inplace(np.ascontiguousarray(array))
        for name, array in states.items():
            self._states[name][0] = self._value(array)
        self.mask, self.length = mask, mask.shape[1]

    def _value(self, array: np.ndarray) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _bind(self, name: str, array: np.ndarray) -> None:
        value = self._values[name] = self._value(array)
        self._binding.bind_ortvalue_input(f"past.{name}", value)
        self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._outputs.append(f"present.{name}")

    @property
    def cache(self) -> dict[str, np.ndarray]:
        held = {name: value.numpy() for name, value in self._values.items()}
        return held | {name: states[0].numpy() for name, states in self._states.items()}

    @property
    def cache_bytes(self) -> int:
        """Bytes of all tensors of the cache, spare capacity included."""
        return sum(array.nbytes for array in self.cache.values())

    def step(self, ids: np.ndarray, mask: np.ndarray | None = None, keep: Sequence[int] | None = None) -> np.ndarray:
        """Append tokens to the cache.

        Args:
            ids: int64 [batch, n].
            mask: 1 for those that count, 0 for padding, int64 [batch, n]; all count without it.
            keep: which of the n get logits; the last one without it.

        Returns:
            Logits, [batch, len(keep), vocabulary].

        Raises:
            ValueError: if the cache has no room for them.
        """
        count = ids.shape[1]
        if self.length + count > self.max_cache_len:
            raise ValueError(
                f"{self.length} tokens and {count} new ones are more than max_cache_len, {self.max_cache_len}"
            )
        fresh = np.ones_like(ids) if mask is None else mask
        self.mask = np.concatenate([self.mask, fresh], axis=1)
        binding = self._binding
        arguments = {"input_ids": ids, "attention_mask": self.mask, "logits_to_keep": np.asarray(keep or [count - 1])}
        for name, array in arguments.items():
            binding.bind_ortvalue_input(name, self._value(array.astype(np.int64)))
        for name, (now, later) in self._states.items():
            binding.bind_ortvalue_input(f"past.{name}", now)
            binding.bind_ortvalue_output(f"present.{name}", later)
        for cache in self.metadata["dense"]:
            binding.bind_ortvalue_input(f"past.{cache['name']}", self._values[cache["name"]])
            binding.bind_output(f"present.{cache['name']}")
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        made = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        for cache in self.metadata["dense"]:
            self._values[cache["name"]] = made[f"present.{cache['name']}"]
        for states in self._states.values():
            states.reverse()
        self.length += count
        return made["logits"].numpy()

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> Any:
        """Continue a prompt, or several: greedily, or as `sampling` says.

        Args:
            prompt: text or tokens, or a list of such.
            max_new_tokens: at most so many; fewer where the model ends.
            eos_token_id: what ends a sequence; what the model's configuration says if None.
            on_token: hears each step's tokens, one a sequence.

        Returns:
            Text for text, tokens for tokens, a list for a list; without the prompt, and without what ends it.

        Raises:
            ValueError: if a prompt is empty, or has no room in the cache.
        """
        several = not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], (int, np.integer))
        prompts: list[Any] = list(prompt) if several else [prompt]
        tokens = [self.encode(given) if isinstance(given, str) else [int(t) for t in given] for given in prompts]
        if not tokens or not all(tokens):
            raise ValueError("the prompt is empty: give some text or tokens")
        longest = max(map(len, tokens))
        if longest > self.max_cache_len:
            raise ValueError(f"the prompt has {longest} tokens, more than max_cache_len, {self.max_cache_len}")
        made = self._generate(
            tokens, longest, max_new_tokens, sampling or Sampling(), self._ends(eos_token_id), on_token
        )
        results = [self.decode(m) if isinstance(p, str) else m for m, p in zip(made, prompts, strict=True)]
        return results if several else results[0]

    def _generate(
        self,
        tokens: list[list[int]],
        longest: int,
        max_new_tokens: int,
        sampling: Sampling,
        ends: set[int],
        on_token: Callable[[list[int]], None] | None,
    ) -> list[list[int]]:
        pad = min(ends, default=0)
        ids = np.array([[pad] * (longest - len(row)) + row for row in tokens], np.int64)
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in tokens], np.int64)
        self.reset(len(tokens))
        logits, made, done = self.step(ids, mask)[:, -1], [list[int]() for _ in tokens], [False] * len(tokens)
        for number in range(max_new_tokens):
            chosen = sampling.choose(logits)
            for row, token in enumerate(chosen):
                done[row] = done[row] or token in ends
                if not done[row]:
                    made[row].append(token)
            if on_token:
                on_token(chosen)
            if all(done) or number + 1 == max_new_tokens or self.length == self.max_cache_len:
                break
            logits = self.step(np.array(chosen, np.int64)[:, None])[:, -1]
        return made

    def _ends(self, given: int | Sequence[int] | None) -> set[int]:
        found = self.metadata.get("eos_token_id") if given is None else given
        return set() if found is None else {found} if isinstance(found, int) else set(found)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as it stands."""
        return self._tokenizer().encode(text).ids

    def chat(self, text: str) -> list[int]:
        """Tokens of a text as a user's turn, where the model has a chat template; else as it stands."""
        around = self.metadata.get("chat")
        if not around:
            return self.encode(text)
        return self._tokenizer().encode(around[0] + text + around[1], add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer().decode(list(tokens), skip_special_tokens=True)

    def _tokenizer(self) -> Any:
        if importlib.util.find_spec("tokenizers") is None:
            raise ModelFileError("tokenizers is not installed: give tokens instead of text, or pip install tokenizers")
        from tokenizers import Tokenizer

        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ModelFileError(f"{str(self.path)!r} has no tokenizer: give tokens instead of text")
        if not hasattr(self, "_loaded"):
            self._loaded = Tokenizer.from_file(str(file))
            self._loaded.no_padding()
            self._loaded.no_truncation()
        return self._loaded
