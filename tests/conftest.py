"""Tests that must be able to fail.

`@pytest.mark.mutation('inr.py', old, new)` runs a test a second time with that one change made to
the source, and demands that it then fails. In-process tests see the change because the modules are
reloaded from the changed text (so tests write `import inr` and `inr.name`, never `from inr import
name`); tests that start scripts take the fixture `repo`, a folder that holds the changed copy.
"""
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = ['common', 'encoders', 'inr', 'vae', 'ldm', 'data', 'metrics']  # in import order
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line('markers', 'mutation(file, old, new): the test must fail after this edit')
    config.addinivalue_line('markers', 'slow: not part of the default run')


def pytest_generate_tests(metafunc):
    edits = [m.args for m in metafunc.definition.iter_markers('mutation')][::-1]
    if edits:
        failing = pytest.mark.xfail(strict=True, raises=(AssertionError, pytest.fail.Exception))
        metafunc.parametrize('mutation', indirect=True, argvalues=[pytest.param(None, id='')] + [
            pytest.param(e, marks=failing, id=f'mutant{i}') for i, e in enumerate(edits)])


def pytest_collection_modifyitems(items):
    """Of a mutant only the last line of a failure is kept: tracebacks cost a fifth of the time."""
    for item in items:
        if hasattr(item, 'callspec') and item.callspec.params.get('mutation'):
            item.repr_failure = lambda info, style=None: info.exconly()


def mutated_source(edit):
    file, old, new = edit
    source = (ROOT / file).read_text()
    if source.count(old) != 1:
        raise ValueError(f'{file} holds {source.count(old)} times {old!r}; a mutation needs exactly one')
    return source.replace(old, new)


def reload_modules(name, source=None):
    """Execute module `name` again, from `source` if given, and those that may have imported it."""
    for module in (sys.modules[m] for m in MODULES[MODULES.index(name):] if m in sys.modules):
        if module.__name__ == name and source:
            exec(compile(source, module.__file__, 'exec'), module.__dict__)
        else:
            importlib.reload(module)


@pytest.fixture(autouse=True)
def mutation(request):
    edit = getattr(request, 'param', None)
    name = edit and edit[0].removesuffix('.py')
    if name not in MODULES or name not in sys.modules:
        yield edit
        return
    try:
        reload_modules(name, mutated_source(edit))
        yield edit
    finally:
        reload_modules(name)


@pytest.fixture
def repo(mutation, tmp_path):
    """The folder of the scripts: the checkout, or under a mutation a changed copy of it."""
    if mutation is None:
        return ROOT
    copy = tmp_path / 'mutant'
    copy.mkdir()
    for file in ROOT.glob('*.py'):
        shutil.copy(file, copy)
    (copy / mutation[0]).write_text(mutated_source(mutation))
    return copy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
