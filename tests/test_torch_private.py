"""Private APIs: all are there, and each that is not costs its own feature alone."""

import subprocess
import sys

import pytest
import torch

from tqc import torch_private as private
from tqc.torch_private import inductor, needs

NAMES = sorted({name for _, names in private.NEEDS.values() for name in names})

# Torch is imported once; then, for each few names, a process of its own in which they are gone imports tqc.
WITHOUT = """
import os, sys, traceback
import torch, torch._dynamo, torch._inductor.compile_fx, torch._inductor.decomposition, transformers.cache_utils

class Gone:
    def __get__(self, *_):
        raise AttributeError

def remove(path):
    *names, last = path.split(".")
    owner = sys.modules[names[0]]
    for name in names[1:]:
        owner = getattr(owner, name)
    sys.modules.update({path: None} if path in sys.modules else {})
    try:
        delattr(owner, last)
    except (AttributeError, TypeError, KeyError):
        setattr(owner if isinstance(owner, type) else type(owner), last, Gone())

def check(paths):
    for path in paths:
        remove(path)
    import tqc, tqc.cache.io, tqc.cache.preallocated, tqc.optimized_module, tqc.passes.edit, tqc.execute.matrix_vector
    from tqc import torch_private
    missing = torch_private.missing()
    for feature, (lost, names) in torch_private.NEEDS.items():
        gone = [path for path in paths if path in names]
        assert bool(gone) == (feature in missing), (paths, feature, missing)
        assert all(lost in missing[feature] and path in missing[feature] for path in gone)

failed = 0
for paths in sys.argv[1:]:
    if os.fork() == 0:
        try:
            check(paths.split())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += os.wait()[1] != 0
sys.exit(failed)
"""


def test_what_is_not_there_is_reported():
    missing = private.missing()
    for name in NAMES:
        features = [feature for feature, (_, names) in private.NEEDS.items() if name in names]
        assert private.find(name, missing) is not missing or all(name in missing[feature] for feature in features)
    assert (private.THREADS in missing) == (private.thread_functions() == (0, 0))


def few_of_each(names, size=5):
    """The names in groups, of each feature one a group at most, and no name within another."""
    groups: list[list[str]] = []
    for name in names:
        features = {feature for feature, (_, needed) in private.NEEDS.items() if name in needed}
        for group in groups:
            others = {feature for feature, (_, needed) in private.NEEDS.items() if set(group) & set(needed)}
            within = any(other.startswith(name) or name.startswith(other) for other in group)
            if len(group) < size and not features & others and not within:
                group.append(name)
                break
        else:
            groups.append([name])
    return [" ".join(group) for group in groups]


@pytest.mark.parametrize("size", [5, pytest.param(1, marks=pytest.mark.extended)])
def test_each_name_costs_its_feature_alone(size):
    groups = few_of_each(NAMES, size)
    done = subprocess.run([sys.executable, "-c", WITHOUT, *groups], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_importing_tqc_is_light():
    code = (
        "import sys, tqc, tqc.torch_private; print([m for m in sys.modules if m in ('torch._dynamo', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_names_in_the_meta_of_nodes():
    nodes = []

    def backend(gm, examples):
        nodes.extend(gm.graph.nodes)
        return gm.forward

    module, x = torch.nn.Sequential(torch.nn.ReLU()), torch.zeros(2)
    torch._dynamo.mark_static_address(x)
    torch.compile(module, backend=backend)(x)
    (given,) = (node for node in nodes if node.op == "placeholder")
    called = next(node for node in nodes if node.op == "call_function" or node.op == "call_method")
    assert isinstance(called.meta[private.EXAMPLE_VALUE], private.FakeTensor)
    assert called.meta[private.MODULE_STACK]
    assert private.STATIC_INPUT in given.meta[private.TENSOR_DICT]


def backend(gm, examples, options=None):
    return gm.forward


@pytest.mark.parametrize("in_place", [True, False])
def test_the_backend_of_a_compiled_model(in_place):
    model = torch.nn.Linear(2, 2)
    assert private.backend_of(model) is None
    if in_place:
        model.compile(backend=backend, options={"a": 1})
    else:
        model = torch.compile(model, backend=backend, options={"a": 1})
    found, given = private.backend_of(model)
    assert found is backend and given["options"] == {"a": 1}


def compiled(function, *examples, **given):
    fake = torch._subclasses.FakeTensorMode()
    module = torch.fx.symbolic_trace(function)
    return private.inductor_compile(module, [fake.from_tensor(example) for example in examples], **given)


@pytest.mark.slow
def test_inductor_gives_an_entry():
    x = torch.randn(3)
    run, entry = compiled(lambda x: (x + 1,), x, cpp_wrapper=True)
    assert torch.equal(run(x)[0], x + 1)
    assert entry, private.missing()
    assert private.CHAINS not in private.missing()


def test_code_without_its_parts_runs_all_the_same(monkeypatch):
    x = torch.randn(3)
    lacking = {private.REGIONS, private.DIRECT}
    monkeypatch.setattr(inductor, "lacking", lambda feature: [feature] if feature in lacking else [])
    for _ in range(2):
        run, entry = compiled(lambda x: (x + 1,), x, cpp_wrapper=True)
        assert entry is None and torch.equal(run(x)[0], x + 1)
        lacking.discard(private.REGIONS)


def test_a_wrapper_that_is_not_understood_is_reported(monkeypatch):
    monkeypatch.setattr(needs, "_met", {})

    class Code:
        current_callable = staticmethod(lambda args: args)

    assert private.entry_of(Code()) is None
    assert "passes no handles" in private.missing()[private.CHAINS]


def test_a_wrapper_with_work_of_its_own_has_no_entry(monkeypatch):
    monkeypatch.setattr(needs, "_met", {})

    def g(args):
        output_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(args)
        return [output_tensors[0].item(), torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors]

    class Code:
        current_callable = staticmethod(g)

    assert private.entry_of(Code()) is None and not needs._met


def test_the_state_of_inductor_holds_its_settings_and_threads():
    from torch._inductor import config

    before = private.inductor_state()
    assert private.inductor_state() == before
    with config.patch(max_autotune=not config.max_autotune):
        assert private.inductor_state() != before
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert private.inductor_state() != before
    finally:
        torch.set_num_threads(threads)
    assert private.inductor_state() == before
