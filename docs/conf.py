"""Sphinx settings of the sites in English and Chinese.

``tools/build_docs.sh`` builds both: ``-t zh_cn`` selects the Chinese one.
Nothing of the package is imported, so Sphinx and its extensions suffice.
"""

import os
import re
import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LANGUAGES = dict(en='English', zh_cn='简体中文')
HERE = 'zh_cn' if tags.has('zh_cn') else 'en'  # noqa: F821
# The web address of the repository with its branch, as for wheels.
HOME = os.environ.get('LORS_PLUGIN_HOME', '').rstrip('/')

project = 'lors_plugin'
author = 'lors_plugin contributors'
copyright = f'{author}, Apache-2.0'
version = release = runpy.run_path(str(ROOT / 'lors_plugin' / 'version.py'))[
    '__version__'
]
language = 'zh_CN' if HERE == 'zh_cn' else 'en'

extensions = ['myst_parser', 'sphinx_copybutton']
templates_path = ['_templates']
exclude_patterns = []
myst_heading_anchors = 4
myst_url_schemes = ['http', 'https', 'mailto', 'site']
# `python` blocks of the pages hold ellipses and shell variables, too.
suppress_warnings = ['misc.highlighting_failure']

html_theme = 'sphinx_book_theme'
html_title = f'lors_plugin {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {
    '**': ['navbar-logo.html', 'language.html', 'search-button-field.html',
           'sbt-sidebar-nav.html']
}  # fmt: skip
html_theme_options = dict(
    home_page_in_toc=True,
    show_navbar_depth=1,
    use_download_button=False,
    use_fullscreen_button=False,
    navbar_persistent=[],
    pygments_light_style='tango',
)

if HERE == 'en':
    extensions += ['sphinx.ext.autodoc', 'sphinx.ext.napoleon',
                   'autoapi.extension']  # fmt: skip
    napoleon_use_ivar = True
    autoapi_dirs = [str(ROOT / 'lors_plugin')]
    # The pages in `api` say what of the package is public.
    autoapi_generate_api_docs = False
    autoapi_add_toctree_entry = False
    autoapi_ignore = ['*/.mim/*', '*/testing/*', '*/triton/*', '*/deploy.py',
                      '*/models/layers*']  # fmt: skip
    # Types of other projects are not looked up: no network, no copies.
    nitpick_ignore_regex = [
        (r'py:.*', r'(?!lors_plugin\.).*'),
        # Types in signatures that no package exports.
        (r'py:class', r'lors_plugin\.adapters\.(sites|presets)\..*'),
    ]


def read_own_modules_only():
    """Keep AutoAPI from reading PyTorch and the hosts, where there are any.

    It would follow every base class into them, which takes minutes, and the
    pages would depend on what is installed.
    """
    from astroid.exceptions import AstroidImportError
    from astroid.manager import AstroidManager

    read = AstroidManager.ast_from_module_name

    def read_own(self, modname, *args, **kwargs):
        if modname and modname.split('.')[0] in ('lors_plugin', 'builtins'):
            return read(self, modname, *args, **kwargs)
        raise AstroidImportError(modname=modname)

    AstroidManager.ast_from_module_name = read_own


LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)')
CODE = re.compile(r'(?ms)^(?P<fence>`{3,}).*?^(?P=fence)[ ]*$|`[^`\n]+`')
# A line break in a Chinese paragraph, which HTML would show as a space. Only
# between Chinese and Latin characters or code there is to be one.
CHINESE = '\u3000-\u9fff\uff00-\uffef'
BREAK = re.compile(
    rf'(?<=[{CHINESE}])\n {{0,2}}(?=\[?[{CHINESE}])'
    r'|(?<=[，。、；：（）！？])\n {0,2}(?=[\w\[]|`[^`])'
)
INCLUDE = re.compile(r'<!-- page: (\S+) -->')


def pages_of_files():
    """Return the site's page of each file elsewhere that has one.

    Returns:
        dict[Path, Path]: From the file, such as ``CONTRIBUTING.md``, to the
        page below ``docs`` that stands for it.
    """
    found = {}
    for page in sorted(DOCS.rglob('*.md')):
        match = INCLUDE.search(page.read_text(encoding='utf-8'))
        if match:
            found[(page.parent / match.group(1)).resolve()] = page
    return found


PAGES = pages_of_files()


def rewrite_link(match, origin, page):
    """Point a relative link of a Markdown file to where the site has it.

    Args:
        match (re.Match): Of ``LINK``.
        origin (Path): The file in which the link is written.
        page (Path): The page of this site that shows it.
    """
    mark, text, target = match.groups()
    path, _, anchor = target.partition('#')
    if re.match(r'\w+:', target) or not path:
        return match.group()
    anchor = f'#{anchor}' if anchor else ''
    file = (origin.parent / path).resolve()
    if file.is_dir() and (file / 'README.md') in PAGES:
        file = file / 'README.md'
    file = PAGES.get(file, file)
    source = DOCS / HERE
    plain = file.is_file() and file.suffix
    if not HOME and not plain and file.exists():
        return text  # a folder, or a file that MyST takes for a reference
    if mark or (file.is_relative_to(source) and plain):
        return f'{mark}[{text}]({relative(file, page)}{anchor})'
    for other in LANGUAGES:
        # A page in the other language: part of the other site.
        if file.is_relative_to(DOCS / other) and file.suffix == '.md':
            address = relative(file.with_suffix('.html'), page)
            return f'[{text}](site:{address}{anchor})'
    if HOME:
        return f'[{text}]({HOME}/{file.relative_to(ROOT).as_posix()}{anchor})'
    return f'[{text}]({relative(file, page)})'  # Sphinx copies the file


def relative(file, page):
    return Path(os.path.relpath(file, page.parent)).as_posix()


def outside_code(change, text):
    """Apply a function to a Markdown text, but not to code in it."""
    parts, start = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[start : code.start()]), code.group()]
        start = code.end()
    return ''.join([*parts, change(text[start:])])


def read_page(app, docname, source):
    """Fill in what is made, and rewrite the links."""
    page = Path(app.env.doc2path(docname)).resolve()
    origin, text = page, source[0]
    for file, stub in PAGES.items():
        if stub == page:
            app.env.note_dependency(str(file))
            origin, text = file, file.read_text(encoding='utf-8')
    if '<!-- model zoo -->' in text:
        make = runpy.run_path(str(DOCS / 'model_zoo.py'))['model_zoo']
        text = text.replace('<!-- model zoo -->', make(page))
    if HERE == 'zh_cn':
        text = BREAK.sub('', text)
    # A link's text may hold code, so links with code come first.
    whole = LINK.sub(
        lambda m: rewrite_link(m, origin, page) if '`' in m.group(2) else m[0],
        text,
    )
    source[0] = outside_code(
        lambda part: LINK.sub(
            lambda m: m[0] if m[3].startswith('site:') or '`' in m[2]
            else rewrite_link(m, origin, page), part
        ),
        whole,
    )  # fmt: skip


def resolve_site_links(app, doctree, docname):
    """Make links to the other language's site what they are in HTML."""
    for node in doctree.findall():
        address = getattr(node, 'attributes', {}).get('refuri', '')
        if address.startswith('site:'):
            node['refuri'] = address.removeprefix('site:')
            node['internal'] = True


def skip_attributes(app, what, name, obj, skip, options):
    """Leave attributes to the docstring of their class."""
    return True if getattr(obj, 'type', '') == 'attribute' else None


def find_exported(app, env, node, contnode):
    """Resolve ``package.module.X`` where ``package.X`` is documented."""
    names = node.get('reftarget', '').split('.')
    if node.get('refdomain') != 'py' or len(names) < 3:
        return None
    node['reftarget'] = '.'.join([*names[:-2], names[-1]])
    return env.domains['py'].resolve_xref(
        env, node['refdoc'], app.builder, node['reftype'],
        node['reftarget'], node, contnode,
    )  # fmt: skip


def add_language_link(app, pagename, templatename, context, doctree):
    """Give the sidebar the same page in the other language, or its start."""
    (other,) = set(LANGUAGES) - {HERE}
    there = (DOCS / other / f'{pagename}.md').is_file()
    context['other_language'] = LANGUAGES[other]
    context['other_page'] = f'../{other}/{pagename if there else "index"}.html'


def mend_chinese_search():
    """Name the stemmer of the Chinese search, which is the English one.

    Sphinx 9.0 calls it ``ChineseStemmer`` in the pages, and every search ends
    in a JavaScript error (sphinx-doc/sphinx#14229).
    """
    from sphinx.search.zh import SearchChinese

    SearchChinese.language_name = 'English'


def setup(app):
    """Connect what is above to Sphinx."""
    if HERE == 'en':
        read_own_modules_only()
    else:
        mend_chinese_search()
    app.connect('source-read', read_page)
    app.connect('doctree-resolved', resolve_site_links)
    app.connect('missing-reference', find_exported)
    if HERE == 'en':
        app.connect('autodoc-skip-member', skip_attributes)
    app.connect('html-page-context', add_language_link)
