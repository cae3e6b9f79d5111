"""Rules that hold for the whole repository."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'lors_plugin'


def sources(*folders):
    """Return the Python files below folders of the repository."""
    found = []
    for folder in folders:
        found += sorted((ROOT / folder).rglob('*.py'))
    return [p for p in found if '.mim' not in p.parts]


def imports_of(tree, path, top_level_only=False):
    """Return the absolute names of the modules that a file imports."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    names = set()
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = package[: len(package) - node.level + 1]
                base = '.'.join([*parts, *filter(None, [node.module])])
            names.add(base)
            names.update(f'{base}.{alias.name}' for alias in node.names)
    return names


def imports(path, top_level_only=False):
    return imports_of(
        ast.parse(path.read_text(encoding='utf-8')), path, top_level_only
    )


def offenders(paths, is_wrong, **kwargs):
    """Return 'file: module' for every import that breaks a rule."""
    return [
        f'{path.relative_to(ROOT)}: {name}'
        for path in paths
        for name in sorted(imports(path, **kwargs))
        if is_wrong(name)
    ]


def below(name, *modules):
    return any(name == m or name.startswith(f'{m}.') for m in modules)


def test_imports_of_resolves_relative_names():
    path = PACKAGE / 'rooms' / 'inner' / 'x.py'
    tree = ast.parse(
        'import torch.nn as nn\n'
        'from . import a\n'
        'from ...ops import b\n'
        'from ..other.c import d\n'
        'def f():\n    import triton\n'
    )
    assert imports_of(tree, path) == {
        'torch.nn',
        'lors_plugin.rooms.inner',
        'lors_plugin.rooms.inner.a',
        'lors_plugin.ops',
        'lors_plugin.ops.b',
        'lors_plugin.rooms.other.c',
        'lors_plugin.rooms.other.c.d',
        'triton',
    }
    assert 'triton' not in imports_of(tree, path, top_level_only=True)


def test_ops_know_torch_only():
    def is_wrong(name):
        if name.split('.')[0] in sys.stdlib_module_names:
            return False
        return not below(name, 'torch', 'triton', 'lors_plugin.ops')

    assert offenders(sources('lors_plugin/ops'), is_wrong) == []


def test_triton_is_imported_lazily():
    """At the top of the kernel files only, which are imported late."""
    files = 'triton', 'triton_kernels', 'triton_utils'

    def of_kernels(path):
        return {path.parent.name, path.stem}.intersection(files)

    paths = [p for p in sources('lors_plugin') if not of_kernels(p)]

    def is_wrong(name):
        return bool(set(name.split('.')).intersection(files))

    assert offenders(paths, is_wrong, top_level_only=True) == []


# What each room may import of the package, beside itself. What is not
# listed (engine, reparam, export, ...) may import
# these rooms, never the reverse.
LOWER = ('ops', 'registry', 'structure', 'utils')
ROOMS = dict(
    ops=(),
    checkpoints=('compat',),
    lors=LOWER,
    adapters=(*LOWER, 'checkpoints'),
    adamixer=(*LOWER, 'lors'),
    parameternet=LOWER,
    language=LOWER,
)
# The rooms whose modules serve MMPretrain as well.
WITHOUT_MMDET = ('lors', 'parameternet', 'adapters', 'language')


@pytest.mark.parametrize('room', ROOMS)
def test_imports_run_one_way(room):
    allowed = [f'lors_plugin.{name}' for name in (room, *ROOMS[room])]

    def is_wrong(name):
        if name == 'lors_plugin':
            return False  # the `from lors_plugin import x` form: x is checked
        return below(name, 'lors_plugin') and not below(name, *allowed)

    assert offenders(sources(f'lors_plugin/{room}'), is_wrong) == []


@pytest.mark.parametrize('room', WITHOUT_MMDET)
def test_rooms_that_never_import_mmdet(room):
    paths = sources(f'lors_plugin/{room}')
    assert offenders(paths, lambda n: below(n, 'mmdet')) == []


def test_nothing_in_the_package_knows_testing():
    testing = (PACKAGE / 'testing', PACKAGE / 'testing.py')
    paths = [
        p for p in sources('lors_plugin') if not set(testing) & {p, *p.parents}
    ]
    assert offenders(paths, lambda n: below(n, 'lors_plugin.testing')) == []


def prints(tree):
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == 'print'
    ]


def test_no_print_in_the_package():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sources('lors_plugin')
        if (lines := prints(ast.parse(path.read_text(encoding='utf-8'))))
    }
    assert found == {}


def ignored_comparisons(tree):
    """Return the lines where a comparison is made and not looked at."""
    names = ('allclose', 'equal', 'isclose', 'array_equal')
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in names
        and isinstance(node.value.func.value, ast.Name)
        and node.value.func.value.id in ('torch', 'np', 'numpy')
    ]


def test_ignored_comparisons_are_found():
    tree = ast.parse('torch.allclose(a, b)\nassert torch.allclose(a, b)\n')
    assert ignored_comparisons(tree) == [1]


def test_no_comparison_is_ignored():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sources('lors_plugin', 'tests', 'tools')
        if (
            lines := ignored_comparisons(
                ast.parse(path.read_text(encoding='utf-8'))
            )
        )
    }
    assert found == {}


def test_test_paths_follow_the_sources():
    """``lors_plugin/a/b.py`` is tested by ``tests/test_a/test_b.py``."""
    outside = 'test_tools', 'test_configs', 'test_docs', 'test_gpu', 'data'
    packages = {p.name for p in PACKAGE.rglob('*') if p.is_dir()}
    strange = [
        str(folder.relative_to(ROOT))
        for folder in sorted((ROOT / 'tests').rglob('test_*'))
        if folder.is_dir()
        and not set(folder.relative_to(ROOT).parts) & set(outside)
        and folder.name.removeprefix('test_') not in packages
    ]
    assert strange == []


def test_every_page_can_be_found():
    """By links, from the README on."""
    docs = ROOT / 'docs'
    found, waiting = set(), [ROOT / 'README.md']
    while waiting:
        page = waiting.pop()
        if page in found:
            continue
        found.add(page)
        for link in re.findall(r'\]\(([^)#\s]+)', page.read_text('utf-8')):
            target = (page.parent / link).resolve()
            if target.suffix == '.md' and target.is_file():
                waiting.append(target)
    lost = sorted(set(docs.rglob('*.md')) - found)
    assert [str(page.relative_to(ROOT)) for page in lost] == []
