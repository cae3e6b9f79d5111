"""Write predictions: pictures, videos, COCO, CSV, YOLO and LabelMe files.

Every file is written beside its place and renamed when it is whole.
"""

import contextlib
import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import cv2
import numpy as np

from lors_plugin.checkpoints.files import replace_file
from lors_plugin.visualization.picture_names import picture_names

from .errors import InferenceError
from .inputs import Frame, Source
from .prediction import Prediction, name_of

FORMATS = ('coco', 'csv', 'yolo', 'labelme')
FPS = 25.0  # of videos and webcams that do not say


class Results:
    """The files of a run below one folder.

    Args:
        out_dir (str | Path): The folder.
        sources (Sequence[Source]): All inputs.
        classes (Sequence[str]): Class names.
        detects (bool): Whether predictions have boxes.
        formats (Sequence[str]): Of :data:`FORMATS`.
        draw (Callable, optional): Makes a picture, RGB, of an image, RGB,
            and a prediction. Without it there are no pictures.
        categories (Sequence[dict]): Of the COCO file that was given, whose
            ids are kept. Defaults to ().

    Raises:
        InferenceError: If a format does not suit the inputs, or a result
            would overwrite an input.
    """

    def __init__(
        self,
        out_dir: Any,
        sources: Sequence[Source],
        classes: Sequence[str],
        detects: bool,
        formats: Sequence[str],
        draw: Optional[Callable] = None,
        categories: Sequence[dict] = (),
    ) -> None:
        _check_formats(formats, sources, detects)
        out = Path(out_dir)
        names = picture_names([source.path for source in sources])
        self._writers: list = []
        if draw is not None:
            self._writers.append(_Pictures(out / 'pictures', draw))
        if 'coco' in formats:
            ids = _image_ids(sources)
            self._writers.append(
                _Coco(out / 'predictions.json', classes, ids, categories)
            )
        if 'csv' in formats:
            self._writers.append(
                _Csv(out / 'predictions.csv', classes, detects)
            )
        if 'yolo' in formats:
            self._writers.append(_Yolo(out / 'labels', classes))
        if 'labelme' in formats:
            self._writers.append(_LabelMe(out / 'labelme', classes))
        self._names = dict(zip(map(id, sources), names))
        self._check_inputs(sources)

    def _check_inputs(self, sources: Sequence[Source]) -> None:
        inputs = {os.path.realpath(s.path) for s in sources}
        for source in sources:
            name = self._names[id(source)]
            for writer in self._writers:
                path = writer.path_of(source, name)
                if os.path.realpath(path) in inputs:
                    raise InferenceError(
                        f'the result {path} would overwrite an input; choose '
                        'another --out-dir'
                    )

    def add(self, frame: Frame, found: Prediction) -> None:
        """Write the prediction for a frame."""
        for writer in self._writers:
            writer.add(frame, self._names[id(frame.source)], found)

    def close(self) -> list[Path]:
        """Finish all files and return them, folders of many as such."""
        for writer in self._writers:
            writer.close()
        return [w.target for w in self._writers if w.target.exists()]

    def discard(self) -> None:
        """Leave nothing of unfinished files behind."""
        for writer in self._writers:
            writer.discard()


def _check_formats(
    formats: Sequence[str], sources: Sequence[Source], detects: bool
) -> None:
    without = [name for name in ('coco', 'yolo') if name in formats]
    if without and not detects:
        raise InferenceError(
            f'the format {without[0]} is for boxes, and a classifier has '
            'none: use csv or labelme'
        )
    videos = [source for source in sources if source.kind != 'image']
    if 'labelme' in formats and videos:
        raise InferenceError(
            f'LabelMe files belong to image files, and {videos[0].path} is a '
            'video: use another format'
        )


def _image_ids(sources: Sequence[Source]) -> dict[int, int]:
    """Return first ids of images by source; frames count on."""
    known = [source.image_id for source in sources]
    if None in known or len(set(known)) < len(known):
        return {}
    return {id(source): source.image_id for source in sources}


class _Writer:
    """Writes one kind of result; ``target`` is its file or folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def path_of(self, source: Source, name: str) -> Path:
        """Return the file for an input."""
        return self.target

    def close(self) -> None:
        """Finish."""

    def discard(self) -> None:
        """Remove what is not finished."""


class _Pictures(_Writer):
    """A picture per image and a video per video."""

    def __init__(self, target: Path, draw: Callable) -> None:
        super().__init__(target)
        self.draw = draw
        self._stack = contextlib.ExitStack()
        self._video: Optional[cv2.VideoWriter] = None
        self._file: tuple = ()
        self._source: Optional[Source] = None

    def path_of(self, source: Source, name: str) -> Path:
        suffix = 'jpg' if source.kind == 'image' else 'mp4'
        return self.target / f'{name}.{suffix}'

    def add(self, frame: Frame, name: str, found: Prediction) -> None:
        image = as_rgb(frame.image)
        picture = np.ascontiguousarray(self.draw(image, found)[..., ::-1])
        path = self.path_of(frame.source, name)
        if frame.source.kind == 'image':
            good, content = cv2.imencode('.jpg', picture)
            if not good:
                raise OSError(f'{path} cannot be encoded')
            with replace_file(path) as beside:
                beside.write_bytes(content.tobytes())
            return
        if frame.source is not self._source:
            self.close()
            self._start_video(frame, path, picture.shape)
        self._video.write(picture)

    def _start_video(self, frame: Frame, path: Path, shape: tuple) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix tells OpenCV the format.
        folder = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix='.', dir=path.parent)
        )
        file = Path(folder, path.name)
        self._video = cv2.VideoWriter(
            str(file),
            cv2.VideoWriter_fourcc(*'mp4v'),
            frame.fps or FPS,
            shape[1::-1],
        )
        if not self._video.isOpened():
            raise OSError(f'{path} cannot be written by OpenCV')
        self._source, self._file = frame.source, (file, path)

    def close(self) -> None:
        if self._video is not None:
            self._video.release()
            os.replace(*self._file)
            self._video = self._source = None
        self._stack.close()

    def discard(self) -> None:
        if self._video is not None:
            self._video.release()
            self._video = None
        self._stack.close()


class _Coco(_Writer):
    """One COCO file with images, categories and boxes with scores."""

    def __init__(
        self,
        target: Path,
        classes: Sequence[str],
        ids: dict[int, int],
        categories: Sequence[dict],
    ) -> None:
        super().__init__(target)
        self._ids, self._classes = ids, classes
        self._categories = list(categories)
        self._by_name = {c['name']: c['id'] for c in categories}
        self._images: list[dict] = []
        self._annotations: list[dict] = []

    def _category(self, label: int) -> int:
        """Return the id of a class: that of the file given, or a new one."""
        name = name_of(self._classes, label)
        if name not in self._by_name:
            new = max(self._by_name.values(), default=0) + 1
            self._by_name[name] = new
            self._categories.append(dict(id=new, name=name))
        return self._by_name[name]

    def add(self, frame: Frame, name: str, found: Prediction) -> None:
        height, width = frame.image.shape[:2]
        number = self._ids.get(id(frame.source), len(self._images) + 1)
        image = dict(id=number, file_name=str(frame.source.path))
        if frame.source.kind != 'image':
            image['frame'] = frame.index
        self._images.append(dict(image, width=width, height=height))
        for label, score, (x1, y1, x2, y2) in zip(
            found.labels, found.scores, found.boxes
        ):
            box = [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)]
            self._annotations.append(
                dict(
                    id=len(self._annotations) + 1,
                    image_id=number,
                    category_id=self._category(int(label)),
                    bbox=box,
                    area=round(box[2] * box[3], 2),
                    iscrowd=0,
                    score=round(float(score), 5),
                )
            )

    def close(self) -> None:
        for label in range(len(self._classes)):
            self._category(label)
        content = dict(
            images=self._images,
            categories=self._categories,
            annotations=self._annotations,
        )
        write_text(self.target, json.dumps(content, ensure_ascii=False))


class _Csv(_Writer):
    """One table with a line per box, or per class of a classifier."""

    def __init__(
        self, target: Path, classes: Sequence[str], detects: bool
    ) -> None:
        super().__init__(target)
        self._classes, self._detects = classes, detects
        self._text = io.StringIO(newline='')
        self._table = csv.writer(self._text)
        corners = ('x1', 'y1', 'x2', 'y2') if detects else ()
        self._table.writerow(
            ('image', 'frame', 'label', 'class', 'score', *corners)
        )

    def add(self, frame: Frame, name: str, found: Prediction) -> None:
        index = '' if frame.source.kind == 'image' else frame.index
        boxes = found.boxes if self._detects else [()] * len(found)
        for label, score, box in zip(found.labels, found.scores, boxes):
            self._table.writerow(
                (
                    frame.source.path,
                    index,
                    label,
                    name_of(self._classes, label),
                    f'{score:.5f}',
                    *(f'{value:.2f}' for value in box),
                )
            )

    def close(self) -> None:
        write_text(self.target, self._text.getvalue())


class _Yolo(_Writer):
    """A text file per image: class, centre, size and score."""

    def __init__(self, target: Path, classes: Sequence[str]) -> None:
        super().__init__(target)
        self._classes = classes

    def path_of(self, source: Source, name: str, index: int = 0) -> Path:
        if source.kind == 'image':
            return self.target / f'{name}.txt'
        return self.target / name / f'{index:06d}.txt'

    def add(self, frame: Frame, name: str, found: Prediction) -> None:
        height, width = frame.image.shape[:2]
        lines = []
        for label, score, (x1, y1, x2, y2) in zip(
            found.labels, found.scores, found.boxes
        ):
            numbers = (
                (x1 + x2) / 2 / width,
                (y1 + y2) / 2 / height,
                (x2 - x1) / width,
                (y2 - y1) / height,
                score,
            )
            lines.append(
                ' '.join([str(label), *(f'{n:.6f}' for n in numbers)])
            )
        text = ''.join(f'{line}\n' for line in lines)
        write_text(self.path_of(frame.source, name, frame.index), text)

    def close(self) -> None:
        text = ''.join(f'{name}\n' for name in self._classes)
        # Beside the folder: in it, it would be taken for labels.
        write_text(self.target.with_name('classes.txt'), text)


class _LabelMe(_Writer):
    """A json file per image, to be corrected by hand in LabelMe."""

    def __init__(self, target: Path, classes: Sequence[str]) -> None:
        super().__init__(target)
        self._classes = classes

    def path_of(self, source: Source, name: str) -> Path:
        return self.target / f'{name}.json'

    def add(self, frame: Frame, name: str, found: Prediction) -> None:
        path = self.path_of(frame.source, name)
        names = [name_of(self._classes, label) for label in found.labels]
        shapes = [
            dict(
                label=label,
                points=[[float(x1), float(y1)], [float(x2), float(y2)]],
                group_id=None,
                description=f'{score:.3f}',
                shape_type='rectangle',
                flags={},
            )
            for label, score, (x1, y1, x2, y2) in zip(
                names,
                found.scores,
                () if found.boxes is None else found.boxes,
            )
        ]
        flags = {} if found.boxes is not None else dict.fromkeys(names, True)
        image = os.path.abspath(frame.source.path)
        height, width = frame.image.shape[:2]
        content = dict(
            version='5.5.0',
            flags=flags,
            shapes=shapes,
            imagePath=os.path.relpath(image, path.parent.absolute()),
            imageData=None,
            imageHeight=height,
            imageWidth=width,
        )
        text = json.dumps(content, ensure_ascii=False, indent=2)
        write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replace_file(path) as beside:
        # As it is, without another newline for the system.
        beside.write_bytes(text.encode('utf-8'))


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Bring an image as it is read, BGR or gray, to RGB, uint8.

    Args:
        image (np.ndarray): Shape (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4).

    Returns:
        np.ndarray: Shape (H, W, 3).
    """
    image = image.astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, 2)
    return np.ascontiguousarray(image[..., 2::-1])
