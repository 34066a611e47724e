"""Numbers hidden in a text, and how well a model finds them again through a cache.

Mean KL on running text does not show lost retrieval: few of its tokens depend on one place far back. Here each of
several names has a number, planted at its own depth of the text, and every one of them is asked for.
"""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqc.evaluate.decode import Decoder, chunks

NUMBERS = 8
DIGITS = 5
# Numbers lie before this share of the text: what follows fills the dense window.
DEEPEST = 0.9
# Fewer tokens of text a number, and the numbers would be most of it.
LEAST_TOKENS = 16
NAMES = (
    *("Amsterdam", "Athens", "Baghdad", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Hamburg"),
    *("Havana", "Istanbul", "Jakarta", "Lisbon", "London", "Madrid", "Melbourne", "Moscow", "Mumbai", "Nairobi"),
    *("Oslo", "Paris", "Prague", "Rome", "Santiago", "Seoul", "Stockholm", "Sydney", "Tokyo", "Toronto"),
    *("Vienna", "Warsaw", "Zurich"),
)
MOST_NUMBERS = len(NAMES) - 1  # one name is only asked for to see where the questions part


@dataclass(frozen=True)
class Question:
    """What is decoded behind the text: `ids` [1, m], the end of the prompt and the answer.

    Attributes:
        first, end: the tokens of the number are `ids[:, first:end]`.
    """

    name: str
    number: str
    ids: Tensor
    first: int
    end: int


@dataclass(frozen=True)
class HiddenNumbers:
    """A text with numbers in it, `context` [1, n], and a question for each."""

    context: Tensor
    questions: tuple[Question, ...]

    def ask(self, decoder: Decoder, on_step: Callable[[str], None], **prefill: Any) -> tuple[Tensor, int]:
        """Prefill the text once, and decode each question and its right answer on a copy of that cache; a cache of
        another project, which may not be one that can be copied, is filled anew for each question.

        Args:
            prefill: further arguments of the call that prefills.

        Returns:
            -log probability of each token of the right numbers, float32 [tokens of all numbers]; how many numbers
            greedy decoding would have said: those whose tokens were all the most likely ones.
        """
        begin, filled = self.context.shape[1], None
        nll, found = [], 0
        for question in self.questions:
            on_step(f"the number of {question.name}")
            if filled is None or decoder.optional:
                decoder.restart()
                decoder.append(self.context, **prefill)
                filled = decoder.cache
            decoder.cache = filled if decoder.optional else copy.deepcopy(filled)
            steps = [
                decoder.step(question.ids[:, first - begin : end - begin])
                for first, end in chunks(begin + question.ids.shape[1], decoder.formats, begin=begin)
            ]
            predicted = torch.cat(steps)[question.first - 1 : question.end - 1]
            right = question.ids[0, question.first : question.end]
            nll.append(-predicted.gather(1, right[:, None])[:, 0].cpu())
            found += bool((predicted.argmax(-1) == right).all())
        decoder.restart()
        return torch.cat(nll), found


def hide_numbers(
    tokenizer: Any, text: str, tokens: int, count: int = NUMBERS, seed: int = 0, device: torch.device | str = "cpu"
) -> HiddenNumbers:
    """Hide `count` numbers of `DIGITS` digits in the beginning of `text`; with the question about `tokens` tokens.

    The prompt is a chat turn if the tokenizer has a chat template. The same arguments give the same numbers.

    Raises:
        ValueError: if there is not text enough, or the tokenizer does not tell numbers or names apart.
    """
    if not 1 <= count <= MOST_NUMBERS:
        raise ValueError(f"numbers must be 1 to {MOST_NUMBERS}, or 0 for none; got {count}")
    generator = random.Random(seed)
    *names, unhidden = generator.sample(NAMES, count + 1)
    numbers = ["".join(generator.choices("123456789", k=DIGITS)) for _ in names]
    needles = [_statement(name, number) for name, number in zip(names, numbers, strict=True)]

    def encode(filler: str, name: str, number: str) -> list[int]:
        return _encode_prompt(tokenizer, _planted(filler, needles), name, number)

    room = tokens - len(encode("", names[0], numbers[0]))
    if room < LEAST_TOKENS * count:
        least = tokens - room + LEAST_TOKENS * count
        raise ValueError(f"numbers={count} needs at least {least} tokens; got tokens={tokens}")
    # A token is seldom more than 16 characters; encoding all of a long text would take longer than the rest.
    filler_ids = list(tokenizer(text[: 16 * room], add_special_tokens=False).input_ids)[:room]
    if len(filler_ids) < LEAST_TOKENS * count:
        raise ValueError(f"text has {len(filler_ids)} tokens; numbers={count} needs at least {LEAST_TOKENS * count}")
    filler = tokenizer.decode(filler_ids)

    prompts = [encode(filler, name, number) for name, number in zip(names, numbers, strict=True)]
    shared = len(os.path.commonprefix([*prompts, encode(filler, unhidden, numbers[0])]))
    questions = []
    for name, number, ids in zip(names, numbers, prompts, strict=True):
        other = "".join(str(int(digit) % 9 + 1) for digit in number)
        # Where the tokens of the number are: the same with another number differs there alone.
        both = [ids, encode(filler, name, other)]
        first = len(os.path.commonprefix(both))
        end = len(ids) - len(os.path.commonprefix([part[::-1] for part in both]))
        if first >= end:
            raise ValueError(f"tokenizer has the same tokens for {number} and {other}: no number can be hidden")
        if first == shared:
            raise ValueError(f"tokenizer has the same tokens for {name} and {unhidden}: no number can be asked for")
        question = torch.tensor([ids[shared:]], device=device)
        questions.append(Question(name, number, question, first - shared, end - shared))
    return HiddenNumbers(torch.tensor([prompts[0][:shared]], device=device), tuple(questions))


def _statement(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def _planted(filler: str, needles: Sequence[str]) -> str:
    """`filler` with the needles on lines of their own, evenly over it up to `DEEPEST`, each between two words."""
    parts, begin = [], 0
    for index, needle in enumerate(needles):
        place = int(DEEPEST * (index + 0.5) / len(needles) * len(filler))
        space = re.compile(r"\s").search(filler, place)
        place = space.start() if space else place
        parts += [filler[begin:place], needle]
        begin = place
    return "\n\n".join([*parts, filler[begin:]])


def _encode_prompt(tokenizer: Any, haystack: str, name: str, number: str) -> list[int]:
    turn = f"{haystack}\n\nThe text above names the secret numbers of cities. What is the secret number of {name}?"
    answer = _statement(name, number)
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(f"{turn}\n{answer}").input_ids)
    turns = [{"role": "user", "content": turn}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(prompt + answer, add_special_tokens=False).input_ids)
