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
    """What pages link to: papers, code and their issues."""
    known = ('https://github.com/', 'https://arxiv.org/')
    strange = {
        f'{page.relative_to(ROOT)}: {link}'
        for page in markdown_files()
        for link in links(page.read_text('utf-8'))
        if re.match(r'\w+:', link) and not link.startswith(known)
    }
    assert strange == set()
