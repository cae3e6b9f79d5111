"""The tables of counts in READMEs.

A table stands between two marks that say what it shows:

    <!-- get_flops: models *_coco.py -->
    <!-- get_flops: parts a_coco.py ../other/b_coco.py -->
    <!-- get_flops: end -->

Paths are relative to the README. ``models`` has a row for each config,
``parts`` a row for each part of one or several models side by side.
"""

import json
import re

MEGA, GIGA = 1e6, 1e9
_TABLE = re.compile(
    r'(<!-- get_flops: (models|parts) (.+?) -->\n)(.*?)'
    r'(<!-- get_flops: end -->)',
    re.DOTALL,
)
_MARK = re.compile(r'<!-- get_flops: (?!end)')


class ReadmeTables:
    """Make and replace the tables; models that are equal count once."""

    def __init__(self):
        self._known = {}

    def count(self, path):
        """Count the model of a config."""
        from mmengine.config import Config

        from lors_plugin.analysis import count_config, test_shape

        cfg = Config.fromfile(path)
        model = json.dumps(cfg.model.to_dict(), sort_keys=True, default=str)
        key = (model, test_shape(cfg))
        if key not in self._known:
            self._known[key] = count_config(cfg)
        return self._known[key]

    def rewrite(self, text, readme):
        """Return the text of a README with its tables made anew.

        Args:
            text (str): What the README says now.
            readme (Path): Where it is.

        Returns:
            str: What it should say.
        """
        if len(_MARK.findall(text)) != len(_TABLE.findall(text)):
            raise ValueError(
                f'{readme}: a mark "<!-- get_flops: ... -->" has no kind '
                '("models" or "parts"), no config or no end'
            )
        make = dict(models=self._models, parts=self._parts)

        def replace(match):
            begin, kind, patterns, _, end = match.groups()
            paths = self._paths(readme, patterns.split())
            lines = make[kind](paths, readme)
            return begin + '\n'.join(lines) + '\n' + end

        return _TABLE.sub(replace, text)

    def _paths(self, readme, patterns):
        found = []
        for pattern in patterns:
            paths = sorted(readme.parent.glob(pattern))
            if not paths:
                raise ValueError(f'{readme}: no config is named {pattern}')
            found += [p for p in paths if p not in found]
        return found

    def _models(self, paths, readme):
        """A row for each config."""
        head = (
            'config', 'image', 'parameters', 'decoder', 'shared in it',
            'multiply-adds', 'decoder', 'mixing', 'kept for backward',
        )  # fmt: skip
        rows = []
        for path in paths:
            result = self.count(path)
            counts, shape = result.counts, result.shape
            total, decoder = counts.total, counts.within('decoder')
            mixing = counts.within('decoder / mixing')
            rows.append(
                (
                    f'[{path.stem}]({path.name})',
                    f'{shape[0]} x {shape[1]}',
                    millions(total.parameters),
                    millions(decoder.parameters),
                    millions(decoder.shared),
                    billions(total.multiply_adds),
                    billions(decoder.multiply_adds),
                    billions(mixing.multiply_adds),
                    gigabytes(counts.saved_bytes),
                )
            )
        return table(head, rows)

    def _parts(self, paths, readme):
        """A row for each part, two columns for each config."""
        all_counts = [self.count(path).counts for path in paths]
        head = ['part']
        for path in paths:
            head += [f'{path.stem}: parameters', 'multiply-adds']
        names = []
        for counts in all_counts:
            names += [
                name
                for name, part in counts.parts.items()
                if name not in names
                and (part.parameters or part.multiply_adds)
            ]
        rows = [
            [name.replace('decoder / ', ''), *self._cells(all_counts, name)]
            for name in sorted(names, key=_order)
        ]
        for title, prefix in (
            ('**mixing**', 'decoder / mixing'),
            ('**decoder**', 'decoder'),
            ('**all**', ''),
        ):
            rows.append([title, *self._cells(all_counts, prefix, True)])
        return table(head, rows)

    def _cells(self, all_counts, name, whole=False):
        cells = []
        for counts in all_counts:
            part = counts.parts.get(name)
            if whole:
                part = counts.within(name) if name else counts.total
            if part is None:
                cells += ['', '']
            else:
                cells += [
                    millions(part.parameters),
                    billions(part.multiply_adds),
                ]
        return cells


# As a query goes through them.
_PARTS = (
    'backbone',
    'neck',
    'query_generator',
    'decoder / attention',
    'decoder / sampling',
    'decoder / mixing: generator',
    'decoder / mixing: products',
    'decoder / mixing: low rank',
    'decoder / mixing: output projection',
    'decoder / FFN',
    'decoder / branches',
)


def _order(name):
    return _PARTS.index(name) if name in _PARTS else len(_PARTS)


def millions(number):
    """A number of parameters, '-' for none."""
    return f'{number / MEGA:.3f} M' if number else '-'


def billions(number):
    """A number of multiply-adds, '-' for none."""
    return f'{number / GIGA:.2f} G' if number else '-'


def gigabytes(number):
    """A number of bytes."""
    digits = 1 if number >= GIGA else 2
    return f'{number / GIGA:.{digits}f} GB'


def table(head, rows):
    """The lines of a table; numbers stand at the right."""
    lines = ['| ' + ' | '.join(head) + ' |']
    lines.append('|---' + '|--:' * (len(head) - 1) + '|')
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
    return lines
