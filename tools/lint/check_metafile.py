"""Check that metafiles and configs agree.

Every ``Config`` of a ``metafile.yml`` exists, every ``Name`` is the stem of
its config and stands there once, every ``In Collection`` and ``README`` is
there, every config (but for ``_base_`` ones) has an entry, and
``model-index.yml`` imports every metafile.
"""

import argparse
import sys
from pathlib import Path

import yaml


def check_metafile(root, metafile):
    """Check one metafile.

    Args:
        root (Path): The root of the repository.
        metafile (Path): The ``metafile.yml``.

    Returns:
        list[str]: What is wrong, a line each.
    """
    where = metafile.relative_to(root)
    try:
        content = yaml.safe_load(metafile.read_text(encoding='utf-8')) or {}
    except yaml.YAMLError as error:
        return [f'{where}: not valid YAML: {error}']
    problems = []
    collections = set()
    for collection in content.get('Collections') or []:
        collections.add(collection.get('Name'))
        readme = collection.get('README')
        if readme and not (root / readme).is_file():
            problems.append(f'{where}: README {readme} does not exist')
    names = set()
    configs = set()
    for model in content.get('Models') or []:
        name, config = model.get('Name'), model.get('Config')
        if name in names:
            problems.append(f'{where}: {name} stands there twice')
        names.add(name)
        if not config:
            problems.append(f'{where}: {name} has no Config')
            continue
        configs.add(config)
        if not (root / config).is_file():
            problems.append(f'{where}: Config {config} does not exist')
        if Path(config).stem != name:
            problems.append(f'{where}: {name} is not the stem of {config}')
        if model.get('In Collection') not in collections:
            problems.append(f'{where}: {name}: unknown In Collection')
    for config in sorted(metafile.parent.glob('*.py')):
        relative = config.relative_to(root).as_posix()
        if not config.name.startswith('_') and relative not in configs:
            problems.append(f'{where}: no entry for {relative}')
    return problems


def check_repository(root):
    """Check all metafiles below ``root/configs``.

    Args:
        root (Path): The root of the repository.

    Returns:
        list[str]: What is wrong, a line each.
    """
    metafiles = sorted((root / 'configs').glob('*/metafile.yml'))
    problems = []
    for metafile in metafiles:
        problems += check_metafile(root, metafile)
    index = root / 'model-index.yml'
    if index.is_file():
        content = yaml.safe_load(index.read_text(encoding='utf-8')) or {}
        imports = set(content.get('Import') or [])
        present = {m.relative_to(root).as_posix() for m in metafiles}
        for path in sorted(imports - present):
            problems.append(f'model-index.yml: {path} does not exist')
        for path in sorted(present - imports):
            problems.append(f'model-index.yml: does not import {path}')
    return problems


def main(argv=None):
    """Print what is wrong and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--root', type=Path, default=Path(__file__).resolve().parents[2]
    )
    problems = check_repository(parser.parse_args(argv).root)
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
