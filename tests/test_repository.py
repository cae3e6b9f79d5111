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
    path = PACKAGE / 'models' / 'layers' / 'x.py'
    tree = ast.parse(
        'import torch.nn as nn\n'
        'from . import a\n'
        'from ...ops import b\n'
        'from ..dense_heads.c import d\n'
        'def f():\n    import triton\n'
    )
    assert imports_of(tree, path) == {
        'torch.nn',
        'lors_plugin.models.layers',
        'lors_plugin.models.layers.a',
        'lors_plugin.ops',
        'lors_plugin.ops.b',
        'lors_plugin.models.dense_heads.c',
        'lors_plugin.models.dense_heads.c.d',
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
    """At the top of the kernel files only, which nobody imports at once."""
    paths = [
        p
        for p in sources('lors_plugin')
        if not p.name.startswith('triton_kernels')
    ]

    def is_wrong(name):
        return below(name, 'triton') or '.triton_kernels' in name

    assert offenders(paths, is_wrong, top_level_only=True) == []


def imports_of_mmdet():
    """What is wrong in the folders that do without MMDetection."""
    paths = sources('lors_plugin/models/backbones', 'lors_plugin/adapters')
    return offenders(paths, lambda n: below(n, 'mmdet'))


def test_imports_of_mmdet_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
    for name, text in (
        ('models/backbones/a.py', 'from mmdet.registry import MODELS'),
        ('models/backbones/b.py', 'import mmdet_like\nimport mmpretrain'),
        ('models/necks/c.py', 'import mmdet'),
        ('adapters/deep/d.py', 'def f():\n    import mmdet'),
    ):
        path = tmp_path / 'lors_plugin' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert imports_of_mmdet() == [
        'lors_plugin/models/backbones/a.py: mmdet.registry',
        'lors_plugin/models/backbones/a.py: mmdet.registry.MODELS',
        'lors_plugin/adapters/deep/d.py: mmdet',
    ]


def test_backbones_and_adapters_never_import_mmdet():
    assert imports_of_mmdet() == []


def test_layers_know_ops_and_no_host_model():
    allowed = (
        'lors_plugin.models.layers',
        'lors_plugin.ops',
        'lors_plugin.registry',
        'lors_plugin.utils',
    )

    def is_wrong(name):
        if below(name, 'mmdet', 'mmpretrain'):
            return True
        if name in ('lors_plugin', 'lors_plugin.models'):
            return False  # the `from . import x` form: x is checked
        return below(name, 'lors_plugin') and not below(name, *allowed)

    assert offenders(sources('lors_plugin/models/layers'), is_wrong) == []


def test_models_do_not_know_what_runs_them():
    upper = (
        'engine', 'reparam', 'checkpoints', 'doctor', 'analysis', 'evaluation'
    )  # fmt: skip
    wrong = [f'lors_plugin.{name}' for name in upper]
    paths = sources('lors_plugin/models', 'lors_plugin/ops')
    assert offenders(paths, lambda n: below(n, *wrong)) == []


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


@pytest.mark.parametrize('folder', ['lors_plugin', 'tools', 'tests'])
def test_files_can_be_read_at_a_sitting(folder):
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources(folder)
        if (count := len(path.read_text('utf-8').splitlines())) > 400
    }
    assert long == {}


def test_test_paths_follow_the_sources():
    """``lors_plugin/a/b.py`` is tested by ``tests/test_a/test_b.py``."""
    outside = ('test_tools', 'test_configs', 'data')
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
    """From the README or from the page to start with."""
    docs = ROOT / 'docs' / 'en'
    start = docs / 'get_started.md'
    linked = set()
    for page in (ROOT / 'README.md', start):
        for link in re.findall(r'\]\(([^)#\s]+)', page.read_text('utf-8')):
            linked.add((page.parent / link).resolve())
    lost = sorted(set(docs.rglob('*.md')) - linked - {start})
    assert [str(page.relative_to(ROOT)) for page in lost] == []
