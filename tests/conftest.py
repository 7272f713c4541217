"""Tests that must be able to fail.

`@pytest.mark.mutation('inr.py', old, new)` names an edit of the source under which the test must
fail. `python -m pytest` runs the tests on the source as it is; `python -m pytest --mutants` runs
them with each of their edits, and nothing else. A mutant is killed by an assertion or pytest.fail
alone: any other exception, such as that of a crash, is an error. In-process tests see the edit
because the modules are executed from the edited text (so tests write `import inr` and `inr.name`,
never `from inr import name`); tests that start scripts take the fixture `repo`, a folder that holds
the edited copy.
"""
import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = ['common', 'encoders', 'inr', 'vae', 'ldm', 'data', 'metrics', 'train_vae', 'train_ldm',
           'sample']  # in import order
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption('--mutants', action='store_true',
                     help='run the tests with the edits of their mutation marks only')


def pytest_configure(config):
    config.addinivalue_line('markers', 'mutation(file, old, new): the test must fail so')
    config.addinivalue_line('markers', 'slow: not part of the default run')


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption('--mutants'):
        edits = [m.args for m in metafunc.definition.iter_markers('mutation')][::-1]
        killed = pytest.mark.xfail(strict=True, raises=(AssertionError, pytest.fail.Exception))
        metafunc.parametrize('mutation', indirect=True, argvalues=[
            pytest.param(e, marks=killed, id=f'mutant{i}') for i, e in enumerate(edits)])


def pytest_collection_modifyitems(config, items):
    """Keep the mutants only; of a failure the last line: tracebacks cost a fifth of the time."""
    if not config.getoption('--mutants'):
        return
    marked = [bool(item.get_closest_marker('mutation')) for item in items]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, marked) if not keep])
    items[:] = [item for item, keep in zip(items, marked) if keep]
    for item in items:
        item.repr_failure = lambda info, style=None: info.exconly()


def mutated_source(edit):
    file, old, new = edit
    source = (ROOT / file).read_text()
    count = source.count(old)
    if count != 1:
        raise ValueError(f'{file} holds {count} times {old!r}; a mutation needs exactly one')
    return source.replace(old, new)


def program(name, edit):
    """tests/NAME.py as a module, with the edit if there is one; its main() is not run."""
    module = ModuleType(name)
    module.__file__ = str(ROOT / f'tests/{name}.py')
    source = mutated_source(edit) if edit else Path(module.__file__).read_text()
    exec(compile(source, module.__file__, 'exec'), module.__dict__)
    return module


def execute_mutated(edit, modules):
    """Execute the edited module and, as they may have imported it, those that come after it."""
    for module in modules:
        if module.__name__ == edit[0].removesuffix('.py'):
            exec(compile(mutated_source(edit), module.__file__, 'exec'), module.__dict__)
        else:
            importlib.reload(module)


@pytest.fixture(autouse=True)
def mutation(request):
    """The edit (file, old, new) of this run of the test, made to the imported modules, or None."""
    edit = getattr(request, 'param', None)
    name = edit and edit[0].removesuffix('.py')
    if name not in MODULES or name not in sys.modules:
        yield edit
        return
    modules = [sys.modules[m] for m in MODULES[MODULES.index(name):] if m in sys.modules]
    names = [dict(vars(module)) for module in modules]
    try:
        execute_mutated(edit, modules)
        yield edit
    finally:  # the very classes and functions of before, which other fixtures may hold
        for module, kept in zip(modules, names):
            vars(module).clear()
            vars(module).update(kept)


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
