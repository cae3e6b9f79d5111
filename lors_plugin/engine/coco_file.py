"""Annotation files in COCO format, and what a data set keeps of them.

MMDetection's ``CocoDataset`` drops boxes silently (no area, an unknown image,
an id that is a text) and breaks off at other mistakes, some of them after an
epoch. :func:`inspect` follows the rules of
``CocoDataset.parse_data_info`` and ``filter_data`` and counts.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional


def how_to_repair(path: Path, classes: Sequence[str] = ()) -> str:
    """Return a sentence with the command that repairs a file."""
    mended = path.with_name(f'{path.stem}_repaired.json')
    command = [path, mended, *(['--classes', *classes] if classes else ())]
    return (
        'This writes a repaired file, if the lack can be made up for:\n'
        '  python tools/dataset_converters/repair_coco.py '
        + shlex.join(map(str, command))
    )


class Tally(dict):
    """Reasons with the number of their cases and the first of them."""

    def add(self, reason: str, example: object) -> None:
        """Count a case."""
        self.setdefault(reason, [0, example])[0] += 1

    def lines(self) -> list[str]:
        """Return a text per reason."""
        return [
            f'{count} {reason} (first: {example})'
            for reason, (count, example) in self.items()
        ]


def read_json(path: str | Path) -> Any:
    """Read a json file as strictly as the loaders of the hosts do.

    Raises:
        ValueError: If it cannot be read, with the file and the cause.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from None
    if data.startswith((b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff')):
        raise ValueError(
            f'{path} starts with a byte order mark, which MMDetection cannot '
            f'read.\n{how_to_repair(Path(path))}'
        )
    try:
        return json.loads(data.decode('utf-8'))
    except UnicodeDecodeError as error:
        cause = f'is not UTF-8: {error}'
    except RecursionError:
        cause = 'is nested too deeply'
    except ValueError as error:
        cause = f'is not whole, valid json: {error}'
    raise ValueError(f'{path} ({len(data)} bytes) {cause}')


def category_names(content: Any) -> Optional[list[str]]:
    """Return the names of the categories in the order of the file.

    Args:
        content (Any): A parsed json file.

    Returns:
        list[str], optional: The names, or None if there are none.
    """
    found = content.get('categories') if isinstance(content, dict) else None
    if not isinstance(found, list):
        return None
    names = [c.get('name') for c in found if isinstance(c, dict)]
    return names if names and all(names) else None


@dataclass
class Report:
    """Counts of what a data set keeps of an annotation file, and of faults.

    Attributes:
        images (int): Images that the data set keeps.
        filtered (int): Images that its ``filter_cfg`` leaves out.
        background (int): Images that it keeps without a box.
        boxes (int): Boxes in the file.
        kept (Counter): Boxes to train on, by class.
        faults (Tally): What the loader cannot read.
        dropped (Tally): Boxes that the loader drops silently.
        chosen (Tally): Boxes that the file or the config leaves out, such as
            crowds and other classes.
        odd (Tally): Boxes and images that are kept but look like a mistake.
        image_ids (set): Ids of the images.
    """

    images: int = 0
    filtered: int = 0
    background: int = 0
    boxes: int = 0
    kept: Counter = field(default_factory=Counter)
    faults: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    chosen: Tally = field(default_factory=Tally)
    odd: Tally = field(default_factory=Tally)
    image_ids: set = field(default_factory=set)

    def line(self, classes: Sequence[str]) -> str:
        """Describe it in one line."""
        images = f'{self.images} images'
        if self.filtered:
            images = f'{self.images} of {self.images + self.filtered} images'
        if self.background:
            images += f' ({self.background} background)'
        kept = sum(self.kept.values())
        text = f'{images}, {kept} of {self.boxes} boxes kept'
        if 1 < len(classes) <= 10 and kept:
            counts = (f'{name} {self.kept[name]}' for name in classes)
            text += f' ({", ".join(counts)})'
        left_out = self.dropped.lines() + self.chosen.lines()
        if left_out:
            text += f'; left out: {", ".join(left_out)}'
        if self.odd:
            text += f'; odd: {", ".join(self.odd.lines())}'
        return text


def is_number(value: Any) -> bool:
    """Return whether a value of a json file is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e15 < value < 1e15  # false for NaN


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_id(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ''


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(is_number, value))
    )


def _is_flag(value: Any) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)


# Fields that the loader or a metric reads: how each is tested, and what it
# has to be.
_ID = (_is_id, 'a number or a text')
RULES = dict(
    images=dict(
        id=_ID,
        file_name=(_is_text, 'a text'),
        width=(_is_positive, 'a positive number'),
        height=(_is_positive, 'a positive number'),
    ),
    categories=dict(id=_ID, name=(_is_text, 'a text')),
    annotations=dict(
        id=_ID,
        image_id=_ID,
        category_id=_ID,
        bbox=(_is_box, 'four finite numbers'),
        area=(is_number, 'a finite number'),
        iscrowd=(_is_flag, '0 or 1'),
    ),
)
# Of an annotation with `ignore` set, the loader reads no more than these.
IGNORED_RULES = {key: _ID for key in ('id', 'image_id', 'category_id')}


def _entries(content: dict, part: str, faults: Tally) -> list[dict]:
    """Return the objects of a list in the file; check their fields."""
    found = content.get(part, [] if part == 'annotations' else None)
    if not isinstance(found, list):
        what = 'nothing' if found is None else f'a {type(found).__name__}'
        faults.add(f'missing list `{part}`', f'found {what}')
        return []
    if not found and part != 'annotations':
        faults.add(f'empty list `{part}`', 'found no entry')
    entries, seen = [], {}
    for number, entry in enumerate(found, 1):
        place = f'no. {number}'
        if not isinstance(entry, dict):
            faults.add(f'of `{part}` are no objects', place)
            continue
        entries.append(entry)
        rules = RULES[part]
        if part == 'annotations':
            name = f'annotation {entry["id"]}' if 'id' in entry else place
            rules = IGNORED_RULES if entry.get('ignore') else rules
        else:
            name = entry.get('file_name' if part == 'images' else 'name')
            name = place = name if _is_text(name) else place
        for key, (is_right, what) in rules.items():
            if key not in entry:
                if key != 'iscrowd':  # as 0
                    faults.add(f'{part} without `{key}`', name)
            elif not is_right(entry[key]):
                faults.add(
                    f'{part} whose `{key}` is not {what}',
                    f'{name}: {entry[key]!r:.60}',
                )
            elif key == 'id':
                first = seen.setdefault(entry['id'], place)
                if first is not place:
                    faults.add(
                        f'{part} with an id that another has',
                        f'id {entry["id"]!r} twice, of {first} and {place}',
                    )
    return entries


def inspect(
    content: Any,
    classes: Optional[Sequence[str]] = None,
    filter_cfg: Optional[dict] = None,
) -> Report:
    """Count what ``CocoDataset`` keeps of a file, and what it cannot read.

    Args:
        content (Any): The parsed file.
        classes (Sequence[str], optional): Names of the classes in use. All
            if None, the default.
        filter_cfg (dict, optional): That of the data set; None, the default,
            in test mode.

    Returns:
        Report: If it has faults, the counts mean nothing.
    """
    report = Report()
    if not isinstance(content, dict):
        report.faults.add(
            'json that is not an object with the lists `images`, '
            '`annotations` and `categories`',
            f'it is a {type(content).__name__}',
        )
        return report
    lists = [_entries(content, part, report.faults) for part in RULES]
    images, categories, annotations = lists
    report.boxes = len(annotations)
    if not report.faults:
        _check_units(annotations, report)
    if not report.faults:
        _count(images, categories, annotations, classes, filter_cfg, report)
    return report


def _check_units(annotations: list[dict], report: Report) -> None:
    """Detect boxes in shares of the image instead of pixels."""
    boxes = [a['bbox'] for a in annotations if not a.get('ignore')]
    if boxes and all(-1 <= v <= 1 for box in boxes for v in box):
        for annotation in annotations:
            report.faults.add(
                'boxes between 0 and 1: they look like shares of the image, '
                'while COCO has pixels',
                f'{annotation.get("bbox")}',
            )


def _count(
    images: list[dict],
    categories: list[dict],
    annotations: list[dict],
    classes: Optional[Sequence[str]],
    filter_cfg: Optional[dict],
    report: Report,
) -> None:
    """Count boxes and images by the rules of ``CocoDataset``."""
    for name, count in Counter(i['file_name'] for i in images).items():
        for _ in range(count - 1):
            report.odd.add('images of a file that another names', name)
    names = {c['id']: c['name'] for c in categories}
    wanted = set(names.values() if classes is None else classes)
    in_use = {key for key, name in names.items() if name in wanted}
    sizes = {i['id']: (i['width'], i['height']) for i in images}
    report.image_ids = set(sizes)
    filter_cfg = filter_cfg or {}
    min_size = filter_cfg.get('min_size', 0)
    left = {key for key, size in sizes.items() if min(size) >= min_size}
    if filter_cfg.get('filter_empty_gt', False):
        left &= {
            a['image_id'] for a in annotations if a['category_id'] in in_use
        }
    with_boxes = set()
    for annotation in annotations:
        example = f'annotation {annotation["id"]}'
        image, category = annotation['image_id'], annotation['category_id']
        if image not in sizes:
            reason = _unknown(image, 'image', sizes)
            report.dropped.add(reason, f'{example}: {image!r:.40}')
            continue
        if min(sizes[image]) < min_size:
            reason = f'in images smaller than filter_cfg.min_size={min_size}'
            report.dropped.add(reason, example)
            continue
        if annotation.get('ignore'):
            report.chosen.add('marked `ignore`', example)
            continue
        x, y, w, h = annotation['bbox']
        width, height = sizes[image]
        inner_w = min(x + w, width) - max(x, 0)
        inner_h = min(y + h, height) - max(y, 0)
        reason = ''
        if w < 1 or h < 1:
            reason = 'less than one pixel wide or high'
        elif inner_w <= 0 or inner_h <= 0:
            reason = 'outside of their image'
        elif annotation['area'] <= 0:
            reason = 'with an `area` of 0 or less'
        elif category not in names:
            reason = _unknown(category, 'category', names)
            example += f': {category!r:.40}'
        if reason:
            report.dropped.add(reason, example)
        elif category not in in_use:
            report.chosen.add('of other classes', example)
        elif annotation.get('iscrowd'):
            report.chosen.add('marked `iscrowd`', example)
        else:
            report.kept[names[category]] += 1
            with_boxes.add(image)
            if max(w - inner_w, h - inner_h) > 1:
                report.odd.add(
                    'boxes that reach beyond their image (COCO has x, y, '
                    'width, height, not corners)',
                    example,
                )
    report.images = len(left)
    report.filtered = len(sizes) - len(left)
    report.background = len(left - with_boxes)


def _unknown(value: Any, kind: str, known: dict) -> str:
    """Return the reason why an id is not among the known ones."""
    texts = {isinstance(i, str) for i in known}
    if isinstance(value, str) and texts == {False}:
        return f'whose {kind}_id is a text, while the {kind} ids are numbers'
    if not isinstance(value, str) and texts == {True}:
        return f'whose {kind}_id is a number, while the {kind} ids are texts'
    return f'whose {kind}_id no {kind} of the file has'


def check_for_host_metric(content: dict) -> Tally:
    """Count what MMDetection's own ``CocoMetric`` cannot read.

    It breaks off there after an epoch; ``lors_plugin.CocoMetric`` does not.
    """
    faults = Tally()
    for annotation in content.get('annotations') or ():
        name = f'annotation {annotation["id"]}'
        if 'iscrowd' not in annotation:
            faults.add('annotations without `iscrowd`', name)
        if isinstance(annotation['id'], str):
            faults.add('annotations whose `id` is a text', name)
    return faults
