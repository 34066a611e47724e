"""What every scorer must do: a plugin joins these tests by existing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.common import normal
from tqc import ops
from tqc.cli.plugins import described, table
from tqc.format import PackedFormat
from tqc.ops import Planes
from tqc.ops.value import PackedValue
from tqc.plugins import make, parse, plugins, scorer_of
from tqc.plugins.scorer import Scorer, Span
from tqc.strategies import make_strategy

SCORERS = [name for name, plugin in plugins().items() if plugin.kind == "scorer"]
BATCH, HEADS, REPEATS, DIM, TOKENS = 2, 2, 2, 16, 330


def formats(name, keep=0.5, **parameters):
    strategy = make_strategy("evict", name, parameters, keep, None, None)
    how = (4, strategy.least_window)
    return (
        PackedFormat(DIM, 4, True, *how, groups=strategy.groups(4, REPEATS)),
        PackedFormat(DIM, 3, False, *how, groups=strategy.groups(3, None)),
    )


def tokens(seed=0):
    key, value = (normal(BATCH, HEADS, TOKENS, DIM, seed=seed + i) for i in (1, 2))
    return key + torch.arange(HEADS).reshape(1, -1, 1, 1), value, normal(BATCH, HEADS * REPEATS, TOKENS, DIM, seed=seed)


def grow(name, splits, given=None, traced=False):
    """Keys and values of `tokens` that came in calls that end at `splits`."""
    k_fmt, v_fmt = formats(name)
    key, value, query = tokens() if given is None else given
    score, pack, extend = (op.traceable if traced else op for op in (ops.score, ops.pack, ops.extend))
    keys = values = None
    begin = 0
    for end in splits:
        new = [x[:, :, begin:end] for x in (key, value, query)]
        scores, rows = score(*new, k_fmt.spec, keys, values, scale=0.25)
        if keys is None:
            keys = pack(new[0], k_fmt.spec, score=scores, query=new[2], state_rows=rows)
            values = pack(new[1], v_fmt.spec, score=scores)
        else:
            if traced:
                keys, values = keys.copy(end), values.copy(end)
            keys = extend(keys, new[0], query=new[2], score=scores, state_rows=rows)
            values = extend(values, new[1], score=scores)
        begin = end
    return keys, values


def places(cache: Planes):
    at = cache.fmt.places_offset
    return cache.pages[:, :, : int(cache.state[1]) // cache.fmt.block_tokens, at : at + cache.fmt.groups.kept]


def rows_of_the_scorer(cache: Planes):
    return cache.dense[:, :, cache.fmt.token_rows + cache.fmt.head_rows :]


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_kept_does_not_depend_on_how_calls_were_split(name):
    whole, values = grow(name, [TOKENS])
    assert int(whole.state[1]) >= 3 * whole.fmt.block_tokens and torch.equal(places(whole), places(values))
    for splits in ([1, 40, 41, 170, TOKENS], [100, *range(101, TOKENS + 1)]):
        keys, others = grow(name, splits)
        assert torch.equal(places(keys), places(whole))
        torch.testing.assert_close(rows_of_the_scorer(keys), rows_of_the_scorer(whole))
        torch.testing.assert_close(ops.read(others), ops.read(values))


@pytest.mark.parametrize("name", SCORERS)
def test_traceable_form_is_the_reference(name):
    for splits in ([TOKENS], [90, 91, 230, TOKENS]):
        for traced, expected in zip(grow(name, splits, traced=True), grow(name, splits), strict=True):
            assert torch.equal(places(traced), places(expected))
            torch.testing.assert_close(rows_of_the_scorer(traced), rows_of_the_scorer(expected))
            torch.testing.assert_close(ops.read.traceable(traced), ops.read(traced))
            if splits == [TOKENS]:  # else the balance of keys is chosen by fewer tokens
                torch.testing.assert_close(ops.read(traced), ops.read(expected))


@pytest.mark.parametrize("name", SCORERS)
def test_types_are_those_of_the_fake(name):
    k_fmt, _ = formats(name)
    key, value, query = (x[:, :, :70] for x in tokens())
    made = ops.score(key, value, query, k_fmt.spec)
    fake = ops.score.fake(key=key, value=value, query=query, spec=k_fmt.spec)
    assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in fake]
    cache = PackedValue(k_fmt, BATCH, HEADS, 70, key.dtype, key.device)
    assert ops.extend.fake(cache=cache, new=key).length == 140


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_finite_and_tell_tokens_apart(name):
    k_fmt, _ = formats(name)
    key, value, query = tokens()
    key[:, :, 40] = 0  # a norm of nothing
    value[:, :, 41] = 0
    scores, _ = ops.score(key, value, query, k_fmt.spec)
    count = int(grow(name, [TOKENS])[0].state[1])
    assert torch.isfinite(scores).all() and (scores[..., :count].std(-1) > 0).all()


@pytest.mark.parametrize("name", SCORERS)
def test_its_text_gives_it_back_and_names_its_parameters(name):
    plugin = make("scorer", name)
    assert scorer_of(str(plugin)) == plugin and str(plugin) == f"{name}()"
    assert plugin.__doc__ and plugins()[name].__module__ and (plugin.paper or name == "random")
    with pytest.raises(ValueError, match=f"scorer {name} has no parameter 'quries'"):
        make("scorer", name, {"quries": 3})


def test_the_command_line_lists_all_of_them():
    found = {plugin["name"]: plugin for plugin in described()}
    assert set(found) == set(plugins()) and all(plugin["title"] for plugin in found.values())
    assert found["snapkv"]["parameters"] == {"queries": 16, "kernel": 5, "by_value": True}
    assert table(list(found.values())).row_count == len(found)


def test_unknown_names_and_values_are_errors_with_the_nearest():
    with pytest.raises(ValueError, match=r"scorer must be one of .*; got 'snapvk' \(did you mean 'snapkv'\?\)"):
        make("scorer", "snapvk")
    with pytest.raises(ValueError, match=r"no parameter 'querys' \(did you mean 'queries'\?\)"):
        make("scorer", "snapkv", {"querys": 3})
    with pytest.raises(TypeError, match="queries of scorer snapkv must be an int, got 2.5"):
        make("scorer", "snapkv", {"queries": 2.5})
    with pytest.raises(TypeError, match="must be a number, got True"):
        make("scorer", "palm", {"ema_decay": True})
    with pytest.raises(ValueError, match="ema_decay of scorer palm must be at least 0 and below 1, got 1"):
        make("scorer", "palm", {"ema_decay": 1})
    with pytest.raises(TypeError, match="scorer_kwargs must be a dict"):
        make("scorer", "palm", 3)
    with pytest.raises(ValueError, match="malformed plugin"):
        scorer_of("palm")
    assert parse("snapkv(queries=4,by_value=False)") == ("snapkv", {"queries": 4, "by_value": False})


def test_scores_that_are_not_finite_are_an_error(monkeypatch):
    class Broken(Scorer):
        def score(self, span):
            return span.group_keys.sum(-1) / 0

    monkeypatch.setattr(sys.modules["tqc.ops.score"], "scorer_of", lambda text: Broken())
    k_fmt, _ = formats("knorm")
    key, value, query = tokens()
    with pytest.raises(ValueError, match=r"scorer knorm\(\) gives scores that are not finite"):
        ops.score(key, value, query, k_fmt.spec)
    key[0, 0, 30] = torch.nan  # tokens like that are not the scorer's fault
    ops.score(key, value, query, k_fmt.spec)


def test_a_masked_token_goes_before_all_others():
    k_fmt, v_fmt = formats("knorm")
    key, value, query = (x[:, :, :170] for x in tokens())
    mask = torch.ones(BATCH, 1, 170, 170, dtype=torch.bool).tril()
    mask[0, :, :, :20] = False  # padding
    scores, rows = ops.score(key, value, query, k_fmt.spec, attn_mask=mask)
    kept = places(ops.pack(key, k_fmt.spec, score=scores, query=query, state_rows=rows))[:, :, 0]
    assert (kept[0] >= 16).all() and (kept[1] < 16).any()  # 4 of the 20 are sinks
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(ops.score(key, value, query, k_fmt.spec, attn_mask=added)[0], scores)


def span(keys, queries=None, values=None, sinks=2, size=32):
    """One group in one head."""

    def put(x):
        return x.reshape(1, 1, 1, *x.shape)

    values = torch.ones_like(keys) if values is None else values
    queries = torch.zeros(1, 4, keys.shape[-1]) if queries is None else queries
    first = torch.zeros(1, dtype=torch.int64)
    return Span(put(keys), put(values), put(torch.zeros(sinks, keys.shape[-1])), put(queries), first, size, 1.0)


def test_attention_of_a_span_is_causal_softmax_written_out():
    keys, queries = normal(50, 8, seed=1), normal(2, 6, 8, seed=2)
    found = span(keys, queries).attention()[0, 0, 0]
    for head in range(2):
        for i in range(6):
            seen = torch.cat([torch.zeros(2, 8), keys[: 44 + i + 1]])
            expected = (seen @ queries[head, i]).softmax(-1)
            torch.testing.assert_close(found[head, i, : len(expected)], expected)
            assert not found[head, i, len(expected) :].any()


def test_scorers_find_what_their_papers_look_for():
    """One token that stands out, in the way that each looks at."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(60, 16, generator=generator) * 0.1 + 1
    at = 11
    novel = keys.clone()
    novel[at] = -3 * novel[at]
    asked = torch.zeros(2, 16, 16) + 2
    asked[..., :8] = -2
    looked_at = keys.clone()
    looked_at[at, 8:], looked_at[at, :8] = 3, -3
    loud = torch.ones(60, 16)
    loud[at] = 9
    small = keys.clone()
    small[at] *= 0.1
    state = torch.zeros(1, 1, 1, 16)
    cases = {
        "snapkv": span(looked_at, asked),
        "h2o": span(looked_at, asked),
        "expected_attention": span(looked_at, asked),
        "knorm": span(small),
        "keydiff": span(novel),
        "palm": span(novel),
        "snr": span(novel, values=loud),
        "sheaf": span(novel, values=loud),
        "bsa": span(novel),
        "fisher": span(novel, values=loud),
    }
    for name, case in cases.items():
        scorer = make("scorer", name, {"kernel": 1} if name == "snapkv" else {})
        scores, _ = scorer.scores(case, state)
        if name == "palm":
            scores = scores[..., 8:]  # at first all is new
            assert int(scores.argmax()) == at - 8
        else:
            assert int(scores.argmax()) == at, name
    assert int(make("scorer", "streaming").score(span(keys)).argmax()) == 31


def test_random_is_random_and_the_same_each_time():
    key, value, query = tokens()
    scores = [ops.score(key, value, query, formats("random", seed=seed)[0].spec)[0] for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0][:, 0], scores[0][:, 1])


def test_another_package_brings_a_plugin_without_a_change_here(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom tqc.plugins.scorer import Scorer\n\n"
        "@dataclass(frozen=True)\nclass Mine(Scorer):\n    name: ClassVar[str] = 'mine'\n    power: int = 2\n\n"
        "    def score(self, span):\n        return (span.group_keys**self.power).sum(-1)\n"
    )
    info = tmp_path / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tqc.plugins]\nmine = mine:Mine\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from tqc.config import Config\n"
        "c = Config.from_options({'strategy': 'evict', 'scorer': 'mine', 'scorer_kwargs': {'power': 4}})\n"
        "print(c.formats(64, 64)[0])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().endswith("mine(power=4)"), result.stderr
