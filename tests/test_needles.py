"""Hidden numbers: where they are, what counts as found, and that a damaged cache loses those that it held there."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from tqc.cache.packed_tensor import PackedTensor, pack
from tqc.evaluate.decode import Decoder
from tqc.evaluate.needles import DIGITS, HiddenNumbers, Question, hide_numbers
from tqc.format import PAGE_TOKENS, PackedFormat

KEYS, VALUES = PackedFormat(64, 8, True, 4, 32), PackedFormat(64, 8, False, 4, 32)
TEXT = " ".join(f"word{index * 37 % 101}" for index in range(900))


class Words:
    """A tokenizer: one token a word, a space with its word, a punctuation mark or a few digits; ids as they come up."""

    def __init__(self, digits: int = 1, chat_template: str | None = None, pattern: str | None = None) -> None:
        self.pattern = pattern or rf"\s?[A-Za-z]+|\d{{1,{digits}}}|\s|[^\w\s]|_"
        self.words: list[str] = []
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        words = ["<s>"] * add_special_tokens + re.findall(self.pattern, text) + ["</s>"] * add_special_tokens
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return SimpleNamespace(input_ids=[self.words.index(word) for word in words])

    def decode(self, ids: Any) -> str:
        return "".join(self.words[index] for index in ids)

    def apply_chat_template(self, turns: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt and not tokenize
        return f"<user>{turns[0]['content']}</user>\n<assistant>"


class Recalling:
    """What attends from the `REACH` tokens before a token to the place where they stood before, and says what followed.

    Keys are the tokens before, values the token; it packs its cache once it holds `packed_from` tokens.
    """

    REACH = 7

    def __init__(self, packed_from: int | None = None, damage: Any = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = F.normalize(torch.randn(2000, 64, generator=generator), dim=-1)
        self.turns = torch.stack(
            [torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(self.REACH)]
        )
        self.packed_from, self.damage = packed_from, damage
        self.calls: list[int] = []

    def __call__(self, ids: Any, past_key_values: Any, use_cache: bool) -> Any:
        seen = getattr(past_key_values, "seen", torch.zeros(self.REACH, dtype=torch.int64))
        seen, count = torch.cat([seen, ids[0]]), ids.shape[1]
        self.calls.append(count)
        past_key_values.seen = seen
        before = torch.stack(  # at each token, and behind the last, what stood before it
            [self.embedding[seen[self.REACH - d : len(seen) + 1 - d]] @ self.turns[d - 1] for d in range(1, 8)]
        ).sum(0)
        new = before[None, None, -count - 1 :]
        keys, values = past_key_values.update(new[:, :, :-1], self.embedding[ids][None], 0)
        layer = past_key_values.layers[0]
        if self.packed_from and keys.shape[2] >= self.packed_from and not isinstance(layer.keys, PackedTensor):
            layer.keys, layer.values = pack(layer.keys, KEYS), pack(layer.values, VALUES)
            if self.damage:
                self.damage(layer)
        mask = torch.ones(count, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - count)
        out = F.scaled_dot_product_attention(new[:, :, 1:], keys + 0, values + 0, mask, scale=4.0)
        return SimpleNamespace(logits=20 * out[0] @ self.embedding.T)


def ask(hidden: Any, run: Any, formats: Any = ()) -> tuple[torch.Tensor, int]:
    return hidden.ask(Decoder("recalling", run, DynamicCache, formats), lambda line: None)


def place_of(hidden: HiddenNumbers, question: Question) -> int:
    """Position of a number in the text."""
    number = question.ids[0, question.first : question.end]
    return int((hidden.context[0].unfold(0, len(number), 1) == number).all(1).nonzero()[0])


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("chat_template", [None, "a template"])
def test_numbers_are_hidden_over_the_text_and_asked_for(digits, chat_template):
    tokenizer = Words(digits, chat_template)
    hidden = hide_numbers(tokenizer, TEXT, 900, 6)
    text = tokenizer.decode(hidden.context[0].tolist())
    assert 860 < hidden.context.shape[1] < 900
    assert text.startswith("<user>" if chat_template else "<s>") and "secret number of" in text[-30:]
    assert len({question.name for question in hidden.questions}) == 6
    places = [text.index(f"The secret number of {q.name} is {q.number}.") / len(text) for q in hidden.questions]
    assert places == sorted(places) and 0.02 < places[0] < 0.15 and 0.7 < places[-1] < 0.9
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) < 0.2
    for question in hidden.questions:
        ids = question.ids[0].tolist()
        assert tokenizer.decode(ids[question.first : question.end]) == question.number
        assert len(question.number) == DIGITS and question.end - question.first == -(-DIGITS // digits)
        asked = tokenizer.decode(ids[: question.first])
        assert asked.startswith(f" {question.name}?") and question.number not in asked
        assert ("<assistant>" in asked) == bool(chat_template)


def test_a_seed_gives_the_same_numbers():
    def numbers(seed: int) -> list[tuple[str, str]]:
        return [(question.name, question.number) for question in hide_numbers(Words(), TEXT, 900, 6, seed).questions]

    assert numbers(1) == numbers(1) != numbers(2)


def test_one_question_is_not_part_of_the_text():
    tokenizer = Words()
    hidden = hide_numbers(tokenizer, TEXT, 300, 1)
    assert tokenizer.decode(hidden.questions[0].ids[0, :2].tolist()).startswith(f" {hidden.questions[0].name}?")


def test_the_text_is_prefilled_once():
    run = Recalling()
    hidden = hide_numbers(Words(), TEXT, 900, 4)
    ask(hidden, run)
    assert run.calls[0] == hidden.context.shape[1] and max(run.calls[1:]) <= PAGE_TOKENS
    assert sum(run.calls[1:]) == sum(question.ids.shape[1] for question in hidden.questions)


def test_caches_that_may_not_be_copied_are_filled_anew():
    hidden, run = hide_numbers(Words(), TEXT, 900, 4), Recalling()
    nll, found = hidden.ask(Decoder("other", run, DynamicCache, optional=True), lambda line: None)
    assert run.calls.count(hidden.context.shape[1]) == 4
    expected, same = ask(hidden, Recalling())
    torch.testing.assert_close(nll, expected)
    assert found == same


@pytest.mark.parametrize("place", [0, 2, 5])
def test_damage_around_a_number_raises_its_likelihood_alone(place):
    hidden = hide_numbers(Words(), TEXT, 900, 6)
    exact, found = ask(hidden, Recalling())
    assert found == 6 and exact.mean() < 0.2
    packed, found = ask(hidden, Recalling(600), (KEYS, VALUES))
    assert found == 6 and abs(packed.mean() - exact.mean()) < 0.05

    page = (place_of(hidden, hidden.questions[place]) - KEYS.sink_tokens) // PAGE_TOKENS

    def damage(layer: Any) -> None:
        for tensor in (layer.keys, layer.values):
            tensor.pages[:, :, max(0, page - 1) : page + 2] = 0

    damaged, found = ask(hidden, Recalling(600, damage), (KEYS, VALUES))
    rise = (damaged - packed).reshape(6, -1).mean(1)
    others = [index for index in range(6) if index != place]
    assert found == 5 and rise[place] > 1 and rise[others].abs().max() < 0.1
    assert damaged.mean() > packed.mean() + 0.15


def test_a_wrong_digit_is_not_found():
    tokenizer = Words()
    hidden = hide_numbers(tokenizer, TEXT, 900, 4)
    number = hidden.questions[1]
    wrong = hidden.context.clone()
    last = place_of(hidden, number) + DIGITS - 1
    wrong[0, last] = tokenizer("1" if number.number[-1] != "1" else "2", add_special_tokens=False).input_ids[0]
    assert ask(hidden, Recalling())[1] == 4
    assert ask(HiddenNumbers(wrong, hidden.questions), Recalling())[1] == 3


@pytest.mark.parametrize(
    ("tokenizer", "text", "tokens", "count", "words"),
    [
        (Words(), TEXT, 900, 0, "numbers must be 1 to 32, or 0 for none; got 0"),
        (Words(), TEXT, 900, 33, "numbers must be 1 to 32, or 0 for none; got 33"),
        (Words(), TEXT, 100, 4, r"numbers=4 needs at least \d{3} tokens; got tokens=100"),
        (Words(), "too short", 900, 4, "text has 2 tokens; numbers=4 needs at least 64"),
        (
            Words(pattern=r"[a-z]+|\d+(?=x)"),
            TEXT,
            900,
            4,
            "tokenizer has the same tokens for .*: no number can be hidden",
        ),
        (Words(pattern=r"\d|\s"), TEXT, 900, 4, "tokenizer has the same tokens for .*: no number can be asked for"),
    ],
)
def test_what_cannot_hide_numbers_is_refused(tokenizer, text, tokens, count, words):
    with pytest.raises(ValueError, match=words):
        hide_numbers(tokenizer, text, tokens, count)
