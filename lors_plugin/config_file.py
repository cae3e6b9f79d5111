"""Read configs whose variables may be overridden too.

A config is a program: by the time MMEngine overrides ``max_epochs`` of

.. code-block:: python

    max_epochs = 12
    train_cfg = dict(max_epochs=max_epochs)

``train_cfg`` has been computed, and the new value changes nothing. Here such
a variable has the new value from its assignment on.
"""

import ast
import difflib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from lors_plugin.compat import (
    changed_configs,
    drop_debug_messages,
    package_folder,
    register_configs,
)
from lors_plugin.utils import few

BASE = '_base_'
OWN = 'lors_plugin'
# Top-level entries that MMEngine or a tool reads.
ENTRIES = frozenset(inspect.signature(Runner.__init__).parameters) | {
    'activation_checkpointing',
    'auto_scale_lr',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'tta_model',
    'tta_pipeline',
}

register_configs()
drop_debug_messages()


class ConfigVariableError(ValueError):
    """A variable of a config is set where that changes nothing."""


def find_config(name: Union[str, Path]) -> Path:
    """Find the config that a command line names.

    Args:
        name (str | Path): A file, or ``PACKAGE::FOLDER/NAME.py`` for a config
            that an installed package brings along, as in ``_base_``.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If there is none. The message names similar
            configs.
    """
    package, separator, inner = str(name).partition('::')
    if not separator and Path(name).is_file():
        return Path(name)
    try:
        folder = package_folder(package if separator else OWN, 'configs')
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{name}: {error}') from None
    if separator and (folder / inner).is_file():
        return folder / inner
    text = f'there is no config {name}'
    if not separator:
        text += f' (current directory: {Path.cwd()})'
        package, inner = OWN, Path(name).name
    known = {
        path.name: path.relative_to(folder).as_posix()
        for path in folder.rglob('*.py')
        if not path.name.startswith('_') and '_base_' not in path.parts
    }
    near = difflib.get_close_matches(Path(inner).name, known, 3)
    if near:
        names = ', '.join(f'{package}::{known[name]}' for name in near)
        text += f'; did you mean {names}?'
    raise FileNotFoundError(text)


def read_config(
    path: Union[str, Path], options: Optional[Mapping[str, Any]] = None
) -> Config:
    """Read a config and override entries and variables of it.

    Args:
        path (str | Path): The file.
        options (Mapping[str, Any], optional): New values by dotted keys, as
            from ``--cfg-options``. Variables that the config uses have them
            from their assignment on, also in the files that it inherits.

    Returns:
        Config: The whole config.

    Raises:
        ConfigVariableError: If a variable cannot be overridden, since it
            belongs to a config of another package or is no plain
            assignment. The message names it, and where it is used.
    """
    cfg = Config.fromfile(path)
    if not options:
        return cfg
    root = _read_source(Path(path))
    variables = {
        key: value
        for key, value in options.items()
        if _is_used_variable(key, root)
    }
    if variables:
        cfg = _evaluate_with(variables, root, cfg)
    _warn_of_unknown(options, cfg)
    entries = {k: v for k, v in options.items() if k not in variables}
    cfg.merge_from_dict(entries)
    return cfg


def check_inherited_variables(
    path: Union[str, Path], options: Optional[Mapping[str, Any]] = None
) -> None:
    """Check that a config sets no variable that its base has used by then.

    Args:
        path (str | Path): The file.
        options (Mapping[str, Any], optional): As for :func:`read_config`,
            which sets these everywhere.

    Raises:
        ConfigVariableError: Naming variables, files and lines.
    """
    root = _read_source(Path(path))
    found = list(_set_in_vain(root, [], options or {}))
    if not found:
        return
    lines = '\n'.join(
        f'  {source.path} sets {name}, but {base.path.name}, which it '
        f'inherits, has used it by then ({_where_read(name, base)})'
        for name, source, base in found
    )
    names = ' '.join(dict.fromkeys(f'{name}=...' for name, *_ in found))
    raise ConfigVariableError(
        f'variables are set where that changes nothing:\n{lines}\n'
        'Set them there, or repeat what is computed from them, such as '
        'train_cfg = dict(max_epochs=max_epochs). For one run, --cfg-options '
        f'{names} changes them everywhere'
    )


class _Source(NamedTuple):
    """A file of a config and those it inherits."""

    path: Path
    # None for JSON, YAML and what is no Python before MMEngine fills it in.
    tree: Optional[ast.Module]
    # By the names that the file has for them.
    bases: dict[str, '_Source']
    names: '_Names'
    # Why it cannot be evaluated anew, '' if it can.
    fixed: str

    def walk(self) -> Iterator['_Source']:
        """Yield the file and all that it inherits."""
        yield self
        for base in self.bases.values():
            yield from base.walk()


def _read_source(path: Path, fixed: str = '') -> _Source:
    path = Path(os.path.abspath(path))
    text = path.read_text(encoding='utf-8')
    tree, inherited = None, []
    if path.suffix == '.py':
        try:
            tree = ast.parse(text)
            inherited, new_style = _base_names(tree)
        except (SyntaxError, ValueError):
            fixed = fixed or 'it cannot be read without MMEngine'
        else:
            if new_style:
                fixed = fixed or 'it inherits in the new style (read_base)'
    bases = {}
    for name in inherited:
        if '::' in name:
            from mmengine.hub import get_config

            package = name.partition('::')[0]
            base = Path(get_config(name).filename)
            bases[name] = _read_source(base, f'it belongs to {package}')
        elif (path.parent / name).is_file():
            bases[name] = _read_source(path.parent / name, fixed)
    return _Source(path, tree, bases, _Names(tree), fixed)


def _base_names(tree: ast.Module) -> tuple[list[str], bool]:
    """Return the files that a config inherits, and whether in new style."""
    names, new_style = [], False
    for statement in tree.body:
        if isinstance(statement, ast.With):
            new_style = True
            names += [
                './' + '../' * (part.level - 1) + f'{module}.py'
                for part in statement.body
                if isinstance(part, ast.ImportFrom) and part.level
                for module in [(part.module or '').replace('.', '/')]
            ]
        elif (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id == BASE
        ):
            value = ast.literal_eval(statement.value)
            names += [value] if isinstance(value, str) else value
    return names, new_style


class _Names(ast.NodeVisitor):
    """Collect where a module reads names, and which ones it assigns."""

    def __init__(self, tree: Optional[ast.Module]) -> None:
        self.reads: dict[str, int] = {}
        self.assigned: set[str] = set()
        # By a loop or `with`, after which no value can be put.
        self.bound: set[str] = set()
        self._depth = 0
        if tree is not None:
            self.visit(tree)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.reads.setdefault(node.id, node.lineno)
        elif not self._depth:
            self.bound.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == BASE:
            self.reads.setdefault(node.attr, node.lineno)
        self.generic_visit(node)

    def _visit_assignment(self, node: ast.stmt) -> None:
        names = _assigned_names(node)
        self.assigned.update(() if self._depth else names)
        if node.value is not None:
            self.visit(node.value)
        for target in _targets(node):
            # `a['b'] = 1` reads `a`, which is no use of it.
            for part in ast.walk(target):
                if isinstance(part, ast.Subscript):
                    self.visit(part.slice)

    visit_Assign = visit_AnnAssign = visit_AugAssign = _visit_assignment

    def _visit_scope(self, node: ast.AST) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_FunctionDef = visit_Lambda = visit_ClassDef = _visit_scope
    visit_ListComp = visit_SetComp = _visit_scope
    visit_DictComp = visit_GeneratorExp = _visit_scope


def _targets(node: ast.stmt) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _assigned_names(node: ast.stmt) -> list[str]:
    return [
        part.id
        for target in _targets(node)
        for part in ast.walk(target)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    ]


def _is_used_variable(key: str, root: _Source) -> bool:
    """Return whether an option sets what the config computes with."""
    name, _, inner = key.partition('.')
    if inner and name in ENTRIES:
        return False  # an entry of its own, as for MMEngine
    known = [source.names for source in root.walk()]
    return any(name in n.assigned | n.bound for n in known) and any(
        name in n.reads for n in known
    )


def _evaluate_with(
    variables: Mapping[str, Any], root: _Source, cfg: Config
) -> Config:
    """Evaluate a config anew, with other values of its variables."""
    statements: dict[str, list[ast.stmt]] = {}
    for key, value in variables.items():
        name, *inner = key.split('.')
        if not inner and isinstance(cfg.get(name), tuple):
            # `a=1,2` is a list, which not all that takes a tuple takes.
            value = tuple(value) if isinstance(value, list) else value
        statements.setdefault(name, []).extend(
            ast.parse(_assignment(name, inner, value)).body
        )
    for source in root.walk():
        names = source.names
        for name in statements:
            fixed = source.fixed
            if name not in names.assigned | names.bound:
                continue
            if name in names.bound:
                fixed = fixed or 'it is set by a loop or by `with`'
            if fixed:
                entries = _entries_with(cfg.to_dict(), cfg.get(name))
                raise ConfigVariableError(
                    f'--cfg-options {name}: {source.path} sets it, and '
                    f'{fixed}, so it cannot be overridden before it is used '
                    f'({_where_read(name, root)}). Override what is computed '
                    f'from it instead: {few(entries, 8)}'
                )
    try:
        with changed_configs(_Override(statements).visit):
            new = Config.fromfile(cfg.filename)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigVariableError(
            f'--cfg-options {" ".join(variables)}: {root.path} cannot be '
            f'computed with it ({type(error).__name__}: {error})'
        ) from error
    print_log(
        f'--cfg-options: {few(list(variables), 9)} from where '
        f'{root.path.name} sets it',
        logger='current',
    )
    return new


def _assignment(name: str, inner: list[str], value: Any) -> str:
    """Write ``name = value``, or with keys ``name['key'][0] = value``."""
    path = ''.join(f'[{int(k) if k.isdigit() else k!r}]' for k in inner)
    return f'{name}{path} = {value!r}'


def _where_read(name: str, root: _Source) -> str:
    found = []
    for source in root.walk():
        line = source.names.reads.get(name)
        found += [f'{source.path.name}, line {line}'] if line else []
    return few(found)


def _entries_with(part: Any, value: Any, path: str = '') -> list[str]:
    """Return the paths below top level of entries that hold a value."""
    found = []
    if isinstance(part, dict):
        for key, child in part.items():
            found += _entries_with(child, value, f'{path}.{key}')
    elif isinstance(part, (list, tuple)) and part != value:
        for index, child in enumerate(part):
            found += _entries_with(child, value, f'{path}.{index}')
    elif path.count('.') > 1:
        text = isinstance(part, str) and isinstance(value, str) and value
        if part == value or (text and part.startswith(value)):
            found.append(path[1:])
    return found


class _Override(ast.NodeTransformer):
    """Put statements after each assignment to a variable."""

    def __init__(self, statements: Mapping[str, list[ast.stmt]]) -> None:
        self.statements = statements

    def _visit_assignment(self, node: ast.stmt) -> list[ast.stmt]:
        return [
            node,
            *(
                statement
                for name in _assigned_names(node)
                for statement in self.statements.get(name, ())
            ),
        ]

    visit_Assign = visit_AnnAssign = visit_AugAssign = _visit_assignment

    def _visit_scope(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_Lambda = visit_ClassDef = _visit_scope


def _warn_of_unknown(options: Mapping[str, Any], cfg: Config) -> None:
    """Warn of names that neither the config nor the runner has."""
    for name in dict.fromkeys(key.partition('.')[0] for key in options):
        if name not in cfg and name not in ENTRIES:
            near = difflib.get_close_matches(name, [*cfg.keys(), *ENTRIES], 1)
            meant = f'; did you mean {near[0]}?' if near else ''
            print_log(
                f'--cfg-options {name}: the config has no such entry, and '
                f'nothing reads it{meant}',
                logger='current',
                level=logging.WARNING,
            )


def _set_in_vain(
    source: _Source, users: list[_Source], options: Mapping[str, Any]
) -> Iterator[tuple[str, _Source, _Source]]:
    """Yield variables that a file sets after what it inherits used them.

    Args:
        source (_Source): The file.
        users (list[_Source]): The files that inherit it.
        options (Mapping[str, Any]): Names that are not looked for.

    Yields:
        tuple: The name, the file that sets it, and the one that used it.
    """
    if source.bases:
        read = set().union(*(s.names.reads for s in (*users, source)))
        left_out = {*read, *ENTRIES, *options, BASE}
        for name in sorted(source.names.assigned - left_out):
            for base in source.bases.values():
                if _is_set_in_vain(name, source, base):
                    yield name, source, base
    for base in source.bases.values():
        yield from _set_in_vain(base, [*users, source], options)


def _is_set_in_vain(name: str, source: _Source, base: _Source) -> bool:
    known = [s.names for s in base.walk()]
    if not any(name in n.assigned for n in known) or not any(
        name in n.reads for n in known
    ):
        return False
    before, after = (
        Config.fromfile(s.path, import_custom_modules=False).get(name)
        for s in (base, source)
    )
    return before != after
