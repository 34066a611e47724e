"""Monitors: they watch a model generate, change nothing, and say what is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tqc
from tests.models.common import FAMILIES, prompt
from tqc.plugins import make, plugins
from tqc.plugins.monitor import Moment

MONITORS = [name for name, plugin in plugins().items() if plugin.kind == "monitor"]
PROMPT, STEPS = 170, 24


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")


def decode(model: Any, monitor: str | None, steps: int = STEPS, damage_at: int | None = None, **options: Any) -> Any:
    """Logits of the steps, and the cache behind them; before step `damage_at` a page of the watched head is damaged."""
    torch._dynamo.reset()
    settings = {"rest": "eager", "provider": "reference", "bits_k": 4, "bits_v": 4, "monitor": monitor, **options}
    run = torch.compile(model, backend="tqai", options=settings)
    cache, ids = DynamicCache(config=model.config), prompt(1, PROMPT + steps)
    found = []
    with torch.no_grad():
        run(ids[:, :PROMPT], past_key_values=cache)
        for step in range(steps):
            if step == damage_at:
                for layer in cache.layers:
                    layer.values.pages[0, 0, 0, 16:].random_(0, 200, generator=torch.Generator().manual_seed(0))
            found.append(run(ids[:, PROMPT + step : PROMPT + step + 1], past_key_values=cache).logits)
    return torch.cat(found, 1), cache


def test_fidelity_is_silent_until_a_page_is_damaged_and_changes_no_step(llama: Any) -> None:
    plain, _ = decode(llama, None)
    watched, cache = decode(llama, "fidelity(every=2)")
    assert torch.equal(plain, watched)
    seen = tqc.monitor(cache)
    assert seen.warning is None and seen.looks == STEPS // 2 and len(seen.columns["error"]) == seen.looks
    # Some of the tokens are packed: the error is that of their codes, not none.
    assert 1e-4 < max(seen.columns["error"]) < 0.2
    _, cache = decode(llama, "fidelity(every=2)", damage_at=8)
    seen = tqc.monitor(cache)
    assert seen.warning and "in look 5 of 12" in seen.warning and "damaged" in str(seen)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] * (name != "fidelity")) for name in MONITORS]
)
def test_every_monitor_watches_and_survives_what_caches_go_through(llama: Any, name: str) -> None:
    _, cache = decode(llama, name, steps=6)
    looks = tqc.monitor(cache).looks
    assert looks >= 1 and len(tqc.monitor(cache).columns) == len(plugins()[name].columns)
    run = torch.compile(llama, backend="tqai", options={"rest": "eager", "provider": "reference", "monitor": name})
    with torch.no_grad():
        cache.crop(-3)
        run(prompt(1, 1), past_key_values=cache)
        assert tqc.monitor(cache).looks >= looks
        cache.batch_repeat_interleave(2)  # copies: watched from here on
        run(prompt(2, 1), past_key_values=cache)
    seen = tqc.monitor(cache)
    assert seen.looks == 1 and all(math.isfinite(x) or name == "lyapunov" for x in seen.columns.popitem()[1])


def test_a_fork_keeps_the_rows_of_each_continuation_apart(llama: Any) -> None:
    import copy

    _, cache = decode(llama, "fidelity(every=1)", steps=2)
    run = torch.compile(
        llama, backend="tqai", options={"rest": "eager", "provider": "reference", "monitor": "fidelity(every=1)"}
    )
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    with torch.no_grad():
        for step in range(4):
            run(prompt(1, 4)[:, step : step + 1], past_key_values=cache)
            run(prompt(1, 9)[:, step + 5 : step + 6], past_key_values=other)
    assert max(tqc.monitor(cache).columns["error"]) < 0.2 and max(tqc.monitor(other).columns["error"]) < 0.2


def moment(output: torch.Tensor, keys: torch.Tensor | None = None) -> Moment:
    keys = torch.randn(8, 4) if keys is None else keys
    return Moment(torch.randn(1, 4), output, keys, torch.randn(len(keys), 4))


def observed(monitor: Any, moments: list[Moment]) -> torch.Tensor:
    state, rows = monitor.state(moments[0]), []
    for one in moments:
        row, state = monitor.observe(one, state)
        rows.append(row)
    return torch.stack(rows)


def test_lyapunov_is_the_rate_at_which_neighbours_part() -> None:
    lyapunov: Any = make("monitor", "lyapunov")
    growing = [moment(torch.full((1, 4), 1e-3 * 1.3**step)) for step in range(40)]
    found = observed(lyapunov, growing)[:, 0]
    assert found[-10:].tolist() == pytest.approx([math.log(1.3)] * 10, rel=1e-3)
    assert "1.3 a step" in lyapunov.judge(found[:, None])
    turn = [moment(torch.tensor([[math.cos(a), math.sin(a), 0, 0]])) for a in (0.1 * n for n in range(40))]
    steady = observed(lyapunov, turn)
    assert steady[-10:, 0].abs().max() < 1e-2 and lyapunov.judge(steady) is None


def test_stability_tells_a_head_that_narrows() -> None:
    stability: Any = make("monitor", "stability")
    wide = [Moment(torch.ones(1, 4), torch.ones(1, 4), torch.ones(8, 4), torch.ones(8, 4))] * 20
    narrow = [Moment(torch.ones(1, 4), torch.ones(1, 4), 20 * torch.eye(8, 4), torch.ones(8, 4))] * 10
    assert stability.judge(observed(stability, wide)) is None
    record = observed(stability, wide + narrow)
    assert record[0] == pytest.approx(1.0) and "fell" in stability.judge(record)


@pytest.mark.parametrize(
    "option, message",
    [
        ("fidelty", "did you mean 'fidelity'"),
        ("snapkv", "monitor must be one of"),
        ("fidelity(evry=2)", "did you mean 'every'"),
        ("fidelity(every=0)", "every of monitor fidelity must be 1 or more steps, got 0"),
        ("lyapunov(every=2)", "growth is that between two steps"),
        (3, "monitor must be a name"),
    ],
)
def test_wrong_names_are_refused(option: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tqc.Config.from_options({"monitor": option})


def test_what_was_not_watched_says_so(llama: Any) -> None:
    _, cache = decode(llama, None, steps=1)
    with pytest.raises(ValueError, match="was not watched"):
        tqc.monitor(cache)
    with pytest.raises(ValueError, match="the cache is left dense"):
        tqc.Config.from_options({"preset": "off", "monitor": "fidelity"})


def test_the_list_of_plugins_shows_figures_where_there_are_some(monkeypatch: Any, tmp_path: Any) -> None:
    from tqc.cli import plugins as listing

    row = {"model": "M", "setting": "s", "bits_4096": 2.5, "numbers_nll": 0.3, "numbers_found": 4}
    rows = [{**row, "options": {"scorer": "h2o"}, "kl_mean": kl} for kl in (0.5, 0.25)]
    (tmp_path / "plugins.json").write_text(json.dumps({"rows": [*rows, {**row, "options": {}, "kl_mean": 0.1}]}))
    monkeypatch.setattr(listing, "RESULTS", tmp_path / "plugins.json")
    found = {plugin["name"]: plugin for plugin in listing.described()}
    assert [figures["kl_mean"] for figures in found["h2o"]["measured"]] == [0.25, 0.5] and not found["palm"]["measured"]
    assert "least KL" in str(listing.table(listing.described()).columns[-1].header)
    monkeypatch.setattr(listing, "RESULTS", tmp_path / "none.json")
    assert len(listing.table(listing.described()).columns) == 5
