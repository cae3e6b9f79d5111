"""The site builds without a warning, and its links lead somewhere."""

import os
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """The links and the anchors of an HTML file."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {'', 'top'}
        self.feed(path.read_text('utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(attrs[k] for k in ('id', 'name') if attrs.get(k))
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def html_files(site):
    """Return the pages; templates of the theme lie beside its scripts."""
    found = sorted(site.rglob('*.html'))
    return [path for path in found if '_static' not in path.parts]


def dead_links(site):
    """Return 'page: link' for the relative links that lead nowhere."""
    pages = {path: Page(path) for path in html_files(site)}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            known = pages[target].anchors if target in pages else {''}
            if not target.is_file() or unquote(parts.fragment) not in known:
                dead.append(f'{path.relative_to(site)}: {link}')
    return dead


def test_dead_links_are_found(tmp_path):
    (tmp_path / 'a.html').write_text(
        '<a href="b.html"><a href="#x"><img src="c.png"><p id="x">'
        '<a href="a.html#y"><a href="mailto:x@y">'
    )
    assert dead_links(tmp_path) == [
        'a.html: b.html',
        'a.html: c.png',
        'a.html: a.html#y',
    ]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site of both languages, built by its command."""
    out = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / 'build_docs.sh'), str(out)],
        env={**os.environ, 'PYTHON': sys.executable, 'LORS_PLUGIN_HOME': ''},
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_no_link_of_the_site_is_dead(site):
    assert dead_links(site) == []


@pytest.mark.slow
def test_site_needs_no_network(site):
    """Scripts, styles, fonts and pictures are in the site itself."""
    foreign = {
        link
        for path in html_files(site)
        for link in Page(path).links
        if urlparse(link).netloc
        and not link.startswith(('https://github.com/', 'https://arxiv.org/'))
    }
    assert foreign == set()


@pytest.mark.slow
def test_reference_holds_what_the_packages_export(site):
    """A name that a docstring loses would vanish without a warning."""
    anchors = set()
    for path in (site / 'en' / 'api').glob('*.html'):
        anchors |= Page(path).anchors
    for name in (
        'lors_plugin.ops.adaptive_mixing',
        'lors_plugin.adamixer.LORSAdaMixerDecoder',
        'lors_plugin.lors.share_stack',
        'lors_plugin.adapters.hook.RepAdapterHook',
        'lors_plugin.parameternet.ParameterNet',
        'lors_plugin.reparam.reparameterize',
        'lors_plugin.engine.hooks.CheckpointHook',
        'lors_plugin.evaluation.CocoMetric',
    ):
        assert name in anchors


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'en/user_guides/adapters',  # long paths in the text
        'en/api/language',  # long types in signatures
        'en/api/ops',  # long names in lists of parameters
        'zh_cn/user_guides/adapters',
    ],
)
def test_pages_fit_a_phone(site, browser, name):
    page = browser.new_page(viewport=dict(width=390, height=800))
    page.goto((site / f'{name}.html').as_uri())
    width = page.evaluate('document.documentElement.scrollWidth')
    assert width == 390


@pytest.mark.slow
@pytest.mark.parametrize(
    'language, word', [('en', 'overlap'), ('zh_cn', '适配器')]
)
def test_search_finds_pages(site, browser, language, word):
    """Sphinx 9.0 alone names a stemmer for Chinese that does not exist."""
    page = browser.new_page()
    page.goto((site / language / 'search.html').as_uri() + f'?q={word}')
    link = page.locator('#search-results li a').first
    link.wait_for(timeout=20_000)
    assert link.get_attribute('href').endswith('.html')


def test_model_zoo_has_every_config():
    zoo = runpy.run_path(str(ROOT / 'docs' / 'model_zoo.py'))['model_zoo']()
    rows = {}
    for line in zoo.splitlines():
        if line.startswith('| ['):
            rows[line[3:].partition(']')[0]] = line
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text('utf-8'))
    models = [
        model
        for name in index['Import']
        for model in yaml.safe_load((ROOT / name).read_text('utf-8'))['Models']
    ]
    assert sorted(rows) == sorted(model['Name'] for model in models)
    for model in models:
        trained = 'Results' in model
        assert ('not trained' in rows[model['Name']]) != trained
