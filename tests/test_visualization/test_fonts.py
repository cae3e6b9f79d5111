"""Names in any script are drawn by a font of the system."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from lors_plugin.inference.prediction import Prediction
from lors_plugin.visualization import fonts
from lors_plugin.visualization.painter import Painter


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make fonts the only ones of the system, besides Matplotlib's own."""
    installed = []
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, 'ttflist', list(manager.ttflist))
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: installed)
    fonts.system_families.cache_clear()

    def add(family, characters):
        pen = TTGlyphPen(None)
        for move, point in zip(
            ('moveTo', 'lineTo', 'lineTo'), ((0, 0), (800, 0), (400, 800))
        ):
            getattr(pen, move)(point)
        pen.closePath()
        glyph = pen.glyph()
        names = ['.notdef', *(f'u{ord(c):x}' for c in characters)]
        builder = FontBuilder(1000, isTTF=True)
        builder.setupGlyphOrder(names)
        builder.setupCharacterMap(
            {ord(c): name for c, name in zip(characters, names[1:])}
        )
        builder.setupGlyf(dict.fromkeys(names, glyph))
        builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        builder.setupHorizontalHeader(ascent=800, descent=-200)
        builder.setupNameTable(dict(familyName=family, styleName='Regular'))
        builder.setupOS2()
        builder.setupPost()
        path = tmp_path / f'{family}.ttf'
        builder.save(path)
        installed.append(str(path))

    yield add
    fonts.system_families.cache_clear()


def draw(names, boxes=None):
    image = np.zeros((60, 200, 3), np.uint8)
    found = Prediction(
        np.arange(len(names)), np.full(len(names), 0.5), boxes=boxes
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        picture = Painter(names).prediction(image, found)
    return picture, [str(warning.message) for warning in told]


def test_fonts_that_have_the_characters_are_found(install, tmp_path):
    broken = tmp_path / 'broken.ttf'
    broken.write_text('no font')
    font_manager.findSystemFonts().append(str(broken))
    install('Trees', '树')
    install('Cats', 'ね')
    assert fonts.font_families('树 ね é') == ['sans-serif', 'Cats', 'Trees']
    assert fonts.font_families('tree é') == ['sans-serif']


def test_names_are_drawn_without_boxes(install):
    install('Trees', '树')
    picture, told = draw(['树'], np.array([[20.0, 20, 60, 50]]))
    assert picture.any() and told == []
    picture, told = draw(['树', 'a'])
    assert told == []


def test_missing_fonts_are_told_once(install, capsys):
    picture, told = draw(['树', '林'], np.array([[20.0, 20, 60, 50]] * 2))
    assert picture.any() and not any('Glyph' in line for line in told)
    draw(['树', '林'])
    out = capsys.readouterr()
    assert (out.out + out.err).count('fonts-noto-cjk') == 1


def test_wide_characters_take_two_columns():
    assert [fonts.columns(s) for s in ('', 'ab', '树 a', 'é')] == [0, 2, 4, 1]
