"""Links of Markdown files, and pages that exist in two languages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r'(?ms)^( *)(`{3,})(\S*)[^\n]*\n(.*?)^ *\2 *$')


def markdown_files():
    """Return the Markdown files that readers of the repository open."""
    found = [*ROOT.glob('*.md'), *(ROOT / '.github').rglob('*.md')]
    for folder in ('configs', 'docs'):
        found += (ROOT / folder).rglob('*.md')
    return sorted(p for p in found if '_build' not in p.parts)


def without_code(text):
    """Return a Markdown text without code blocks and inline code."""
    return re.sub(r'`[^`\n]*`', '', FENCE.sub('', text))


def anchors(text):
    """Return the anchors of the headings, made as GitHub makes them."""
    found = {}
    for heading in re.findall(r'(?m)^#+ +(.*)$', FENCE.sub('', text)):
        heading = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).strip()
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        number = found.get(slug, -1) + 1
        found[slug] = number
        if number:
            found[f'{slug}-{number}'] = 0
    return set(found)


def links(text):
    """Return the targets of links and images, outside of code."""
    text = FENCE.sub('', text)
    # Code in a link's text is common; a link in code is none.
    text = re.sub(r'`[^`\n]*`', 'code', text)
    return re.findall(r'\]\(([^()\s]+)\)', text)


def code_blocks(text):
    """Return (language, code) of the blocks; directives are none."""
    return [
        (match[3], match[4])
        for match in FENCE.finditer(text)
        if not match[3].startswith('{')
    ]


def tables(text):
    """Return the tables as lists of rows of cells."""
    found, rows = [], []
    for line in [*FENCE.sub('', text).splitlines(), '']:
        if line.startswith('|'):
            cells = re.split(r'(?<!\\)\|', line.strip().strip('|'))
            rows.append([cell.strip() for cell in cells])
        elif rows:
            found.append(rows)
            rows = []
    return found


def dead_links(page, root):
    """Return the relative links of a file that lead nowhere."""
    dead = []
    for link in links(page.read_text('utf-8')):
        if re.match(r'\w+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        if (
            not target.exists()
            or not target.is_relative_to(root)
            or anchor
            and anchor not in anchors(target.read_text('utf-8'))
        ):
            dead.append(link)
    return dead


def test_dead_links_are_found(tmp_path):
    page = tmp_path / 'a.md'
    page.write_text(
        '# One two\n\n## One, `two`?\n\n[a](#one-two-1) [b](b.md) '
        '[c](#three) [`d`](a.md#one-two)\n\n```\n[e](e.md)\n```\n'
    )
    assert dead_links(page, tmp_path) == ['b.md', '#three']


@pytest.mark.parametrize(
    'page',
    markdown_files(),
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_links(page):
    assert dead_links(page, ROOT) == []


def test_links_of_the_web_need_no_registry():
    """Targets of links: papers, code and their issues."""
    known = ('https://github.com/', 'https://arxiv.org/')
    strange = {
        f'{page.relative_to(ROOT)}: {link}'
        for page in markdown_files()
        for link in links(page.read_text('utf-8'))
        if re.match(r'\w+:', link) and not link.startswith(known)
    }
    assert strange == set()


# The pages that exist in both languages.
PAIRS = [
    (ROOT / 'README.md', ROOT / 'README_zh-CN.md'),
    *(
        (
            ROOT / 'docs' / 'en' / page.relative_to(ROOT / 'docs' / 'zh_cn'),
            page,
        )
        for page in sorted((ROOT / 'docs' / 'zh_cn').rglob('*.md'))
        if page.name != 'index.md'
    ),
]
both_languages = pytest.mark.parametrize(
    ('english', 'chinese'),
    PAIRS,
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)


def commands(text):
    """Return the code blocks without comments, which are translated."""
    return [
        (language, re.sub(r'(?m)(^|\s)#\s.*$', '', code).split())
        for language, code in code_blocks(text)
    ]


def figures(row):
    """Return the numbers and the code of a row, in any order."""
    text = re.sub(r'\]\([^)]*\)', ']', ' '.join(row))
    code = re.findall(r'`([^`]*)`', text)
    return sorted(re.findall(r'\d+(?:[.,]\d+)*', text)), sorted(code)


def test_figures_are_compared_without_their_order():
    assert figures(['two 0.5 of 3,000', '`a.py`']) == figures(
        ['3,000 的 0.5', '`a.py`']
    )
    assert figures(['0.5']) != figures(['0.6'])
    assert figures(['`--a`']) != figures(['`--b`'])


@both_languages
def test_commands_are_the_same(english, chinese):
    ours, theirs = (
        commands(page.read_text('utf-8')) for page in (english, chinese)
    )
    assert theirs == ours


@both_languages
def test_tables_are_the_same(english, chinese):
    ours, theirs = (
        [[figures(row) for row in table] for table in tables(text)]
        for text in (page.read_text('utf-8') for page in (english, chinese))
    )
    assert theirs == ours


@both_languages
def test_sections_are_the_same(english, chinese):
    """As many headings of each level, in the same order."""
    ours, theirs = (
        re.findall(r'(?m)^#+(?= )', FENCE.sub('', page.read_text('utf-8')))
        for page in (english, chinese)
    )
    assert theirs == ours


def test_readmes_name_each_other():
    assert 'README_zh-CN.md' in links((ROOT / 'README.md').read_text('utf-8'))
    assert 'README.md' in links((ROOT / 'README_zh-CN.md').read_text('utf-8'))
