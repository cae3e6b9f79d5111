"""Fonts of the system for characters that Matplotlib's own font lacks."""

import logging
import unicodedata
import warnings
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from mmengine.logging import print_log


def font_families(text: str, generic: str = 'sans-serif') -> list[str]:
    """Name the fonts that have the characters of a text.

    Matplotlib takes each character from the first that has it. Characters
    that no font has become boxes; a warning says once what to install.

    Args:
        text (str): What is to be drawn.
        generic (str): Family of the characters that Matplotlib's own font
            has. Defaults to 'sans-serif'.

    Returns:
        list[str]: The generic family, and others of the system if needed.
    """
    usual = FT2Font(font_manager.findfont('DejaVu Sans'))
    lacking = {c for c in text if c.isprintable() and not has(usual, c)}
    return [generic, *system_families(''.join(sorted(lacking)))]


def has(font: FT2Font, character: str) -> bool:
    """Return whether a font has a character."""
    return font.get_char_index(ord(character)) != 0


@cache
def system_families(characters: str) -> tuple[str, ...]:
    """Find families for characters, also those installed a minute ago.

    Matplotlib reads its list of fonts from a cache, so files that it does not
    know are added to the list.
    """
    families, lacking = [], set(characters)
    known = {font.fname for font in font_manager.fontManager.ttflist}
    paths = font_manager.findSystemFonts() if characters else ()
    for path in sorted(paths, key=by_plainness):
        if not lacking:
            break
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # no font, or a damaged one
            continue
        found = {c for c in lacking if has(font, c)}
        if found:
            if path not in known:
                font_manager.fontManager.addfont(path)
            families.append(font.family_name)
            lacking -= found
    if lacking:
        warnings.filterwarnings('ignore', r'Glyph \d+ .* missing from font')
        print_log(
            f'no font of this machine has {"".join(sorted(lacking))}: boxes '
            'are drawn instead. For Chinese, Japanese and Korean names '
            '"apt install fonts-noto-cjk" brings one',
            logger='current',
            level=logging.WARNING,
        )
    return tuple(families)


def by_plainness(path: str) -> tuple:
    """Sort regular fonts without serifs first."""
    name = Path(path).stem.lower()
    odd = any(s in name for s in ('bold', 'italic', 'oblique', 'light'))
    return odd, 'serif' in name or 'mono' in name, 'regular' not in name, path


def columns(text: str) -> int:
    """Return the width of a text in characters of Latin script."""
    wide = sum(unicodedata.east_asian_width(c) in 'WF' for c in text)
    return len(text) + wide
