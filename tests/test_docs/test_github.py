"""Workflows, forms and the Dockerfile name what exists."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / '.github'
WORKFLOWS = sorted((GITHUB / 'workflows').glob('*.yml'))
FORMS = [
    path
    for path in sorted((GITHUB / 'ISSUE_TEMPLATE').glob('*.yml'))
    if path.name != 'config.yml'
]
named = dict(ids=lambda path: path.name)


def load(path):
    return yaml.safe_load(path.read_text('utf-8'))


def missing_files(command):
    """Return the files of the repository that a command names in vain."""
    words = [w.partition(':')[0] for w in shlex.split(command)]
    files = [
        word
        for word in words
        if re.fullmatch(r'(tools|requirements|docker)/[\w./-]+', word)
    ]
    return [name for name in files if not (ROOT / name).exists()]


def test_missing_files_are_found():
    command = 'bash tools/run_tests.sh && python tools/no.py'
    assert missing_files(command) == ['tools/no.py']


@pytest.mark.parametrize('path', WORKFLOWS, **named)
def test_workflow(path):
    content = load(path)
    # YAML 1.1 reads the key `on` as true.
    assert {'push', 'pull_request'} <= set(content[True])
    for job in content['jobs'].values():
        steps = job['steps']
        assert steps[0]['uses'].startswith('actions/checkout@')
        for step in steps:
            assert ('run' in step) != ('uses' in step)
            assert missing_files(step.get('run', '')) == []
            if 'uses' in step:
                assert re.fullmatch(r'[\w-]+/[\w-]+@v\d+', step['uses'])


def test_oldest_and_newest_versions_are_tested():
    (path,) = [p for p in WORKFLOWS if p.stem == 'test']
    rows = load(path)['jobs']['test']['strategy']['matrix']['include']
    pythons = [row['python'] for row in rows]
    classifiers = re.findall(
        r'Python :: (3\.\d+)', (ROOT / 'setup.py').read_text('utf-8')
    )
    assert pythons == [classifiers[0], classifiers[-1]]
    runtime = (ROOT / 'requirements' / 'runtime.txt').read_text('utf-8')
    oldest = re.search(r'^torch>=(\S+)', runtime, re.M)[1]
    assert rows[0]['torch'].startswith(f'torch=={oldest}.')


@pytest.mark.parametrize('path', FORMS, **named)
def test_issue_form(path):
    form = load(path)
    assert form['name'] and form['description']
    fields = [part for part in form['body'] if part['type'] != 'markdown']
    names = [field['id'] for field in fields]
    assert names and len(set(names)) == len(names)
    for field in fields:
        assert field['type'] in ('input', 'textarea')
        assert field['attributes']['label']
    if path.stem in ('bug', 'results'):
        assert 'lors_plugin.doctor' in path.read_text('utf-8')


def test_read_the_docs_runs_the_build():
    (command,) = load(ROOT / '.readthedocs.yaml')['build']['commands']
    assert missing_files(command) == []
    assert 'tools/build_docs.sh' in command


def test_dockerfile_copies_what_exists():
    text = (ROOT / 'docker' / 'Dockerfile').read_text('utf-8')
    sources = re.findall(r'(?m)^COPY (\S+) ', text)
    assert sources
    assert [s for s in sources if not (ROOT / s).exists()] == []
    assert missing_files(text.replace("'", ' ').replace('\\\n', ' ')) == []


@pytest.mark.parametrize(
    'path',
    [*WORKFLOWS, *FORMS, ROOT / 'docker' / 'Dockerfile'],
    **named,
)
def test_no_host_is_named(path):
    """Registries are those that the machine is set up for."""
    assert re.findall(r'https?://\S+', path.read_text('utf-8')) == []
