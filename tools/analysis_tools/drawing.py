"""Pictures of boxes, for the tools in this folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

# BGR
YELLOW, GREEN, MAGENTA = (0, 230, 255), (70, 220, 60), (220, 60, 255)
WHITE, DARK = (255, 255, 255), (40, 40, 40)
FONT = cv2.FONT_HERSHEY_SIMPLEX
HEADER, GAP = 34, 6


class DrawError(RuntimeError):
    """A mistake in the input that the user can repair."""


@dataclass
class Sample:
    """One image with its boxes, all in pixels of the original image.

    Attributes:
        path (str): The image.
        gt_boxes (np.ndarray): Corners, has shape (G, 4).
        gt_labels (np.ndarray): Has shape (G, ).
        boxes (np.ndarray): Predicted corners, best score first, has shape
            (N, 4).
        scores (np.ndarray): Has shape (N, ).
        labels (np.ndarray): Has shape (N, ).
    """

    path: str
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, int))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the IoU of all pairs of boxes.

    Args:
        a (np.ndarray): Corners, has shape (N, 4).
        b (np.ndarray): Corners, has shape (G, 4).

    Returns:
        np.ndarray: Has shape (N, G).
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas = [np.prod(c[:, 2:] - c[:, :2], axis=-1) for c in (a, b)]
    union = areas[0][:, None] + areas[1][None] - inter
    return inter / np.maximum(union, 1e-9)


def match(sample: Sample, iou_thr: float = 0.5) -> np.ndarray:
    """Assign predictions to ground truth, best score first.

    Args:
        sample (Sample): Image with boxes.
        iou_thr (float): Smallest IoU of a hit. Defaults to 0.5.

    Returns:
        np.ndarray: Index of the ground truth, or -1, for each prediction;
        has shape (N, ).
    """
    hits = np.full(len(sample.boxes), -1)
    if not len(sample.gt_boxes):
        return hits
    ious = box_iou(sample.boxes, sample.gt_boxes)
    ious[sample.labels[:, None] != sample.gt_labels[None]] = 0
    for i, row in enumerate(ious):
        best = int(row.argmax())
        if row[best] >= iou_thr:
            hits[i] = best
            ious[:, best] = 0
    return hits


def best_threshold(samples: Sequence[Sample]) -> float:
    """Find the score threshold with the best F1 over all images.

    Args:
        samples (Sequence[Sample]): All images.

    Returns:
        float: The threshold, 0.3 when nothing was found at all.
    """
    scores = np.concatenate([s.scores for s in samples])
    found = np.concatenate([match(s) >= 0 for s in samples])
    if not found.any():
        return 0.3
    order = np.argsort(-scores, kind='stable')
    hits = np.cumsum(found[order])
    total = sum(len(s.gt_boxes) for s in samples)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    return float(scores[order][f1.argmax()])


def draw_box(
    canvas: np.ndarray,
    box: np.ndarray,
    color: tuple[int, int, int],
    dashed: bool = False,
) -> None:
    """Draw one box.

    Args:
        canvas (np.ndarray): Picture, changed in place, has shape (H, W, 3).
        box (np.ndarray): Corners in pixels of the canvas, has shape (4, ).
        color (tuple[int]): BGR colour.
        dashed (bool): Whether to interrupt the line. Defaults to False.
    """
    x1, y1, x2, y2 = (int(round(float(v))) for v in box)
    if dashed:
        for x in range(x1, x2, 10):
            for y in (y1, y2):
                cv2.line(canvas, (x, y), (min(x + 5, x2), y), color, 2)
        for y in range(y1, y2, 10):
            for x in (x1, x2):
                cv2.line(canvas, (x, y), (x, min(y + 5, y2)), color, 2)
    else:
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, 2, cv2.LINE_AA)


def draw_text(
    canvas: np.ndarray, box: np.ndarray, color: tuple, text: str
) -> None:
    """Write the label of a box inside its upper left corner.

    Args:
        canvas (np.ndarray): Picture, changed in place, has shape (H, W, 3).
        box (np.ndarray): Corners in pixels of the canvas, has shape (4, ).
        color (tuple[int]): BGR colour of the ground.
        text (str): Label.
    """
    (width, height), _ = cv2.getTextSize(text, FONT, 0.45, 1)
    left = min(max(int(box[0]), 0), max(canvas.shape[1] - width - 4, 0))
    top = min(max(int(box[1]), 0), max(canvas.shape[0] - height - 5, 0))
    corner = (left + width + 4, top + height + 5)
    cv2.rectangle(canvas, (left, top), corner, color, -1)
    place = (left + 2, top + height + 2)
    cv2.putText(canvas, text, place, FONT, 0.45, DARK, 1, cv2.LINE_AA)


def header(width: int, parts: Sequence[tuple[str, tuple]]) -> np.ndarray:
    """Make the line of text above a picture.

    Args:
        width (int): Width in pixels.
        parts (Sequence[tuple]): Texts and their BGR colours.

    Returns:
        np.ndarray: Has shape (HEADER, width, 3).
    """
    bar = np.full((HEADER, width, 3), DARK, np.uint8)
    scale, x = 0.55, 8
    total = sum(cv2.getTextSize(t, FONT, 1, 1)[0][0] + 20 for t, _ in parts)
    scale = min(scale, (width - 16) / max(total, 1))
    for text, color in parts:
        place = (x, HEADER - 11)
        cv2.putText(bar, text, place, FONT, scale, color, 1, cv2.LINE_AA)
        x += int(cv2.getTextSize(text, FONT, scale, 1)[0][0] + 20 * scale)
    return bar


def load_enlarged(path: str, side: int) -> tuple[np.ndarray, float]:
    """Load an image in the size of a picture.

    Args:
        path (str): The image.
        side (int): Longer side in pixels. Small images are enlarged.

    Returns:
        tuple: The image, shape (H, W, 3), and its scale.
    """
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise DrawError(f'cannot read image {path}')
    scale = side / max(image.shape[:2])
    way = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=way), (
        scale
    )


def draw_truth(
    sample: Sample,
    classes: Sequence[str],
    side: int = 720,
    texts: bool = True,
) -> np.ndarray:
    """Draw ground truth alone, a colour a class.

    Args:
        sample (Sample): Image with boxes.
        classes (Sequence[str]): Class names.
        side (int): Longer side in pixels. Defaults to 720.
        texts (bool): Whether to write labels and the header. Defaults to
            True.

    Returns:
        np.ndarray: The picture, has shape (H, W, 3).
    """
    image, scale = load_enlarged(sample.path, side)
    boxes = list(zip(sample.gt_boxes * scale, sample.gt_labels))
    for box, label in boxes:
        draw_box(image, box, class_color(label))
    if not texts:
        return image
    for box, label in boxes:
        draw_text(image, box, class_color(label), classes[label])
    counts = np.bincount(sample.gt_labels, minlength=len(classes))
    parts = [
        (f'{count} {name}', class_color(label))
        for label, (count, name) in enumerate(zip(counts, classes))
        if count
    ]
    bar = header(image.shape[1], parts or [('no boxes', WHITE)])
    return np.vstack([bar, image])


def class_color(label: int) -> tuple[int, int, int]:
    """Return a bright BGR colour; neighbouring numbers differ most."""
    hue = int(30 + label * 111) % 180
    pixel = np.array([[[hue, 170, 255]]], np.uint8)
    return tuple(cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].tolist())


def draw_pair(
    sample: Sample,
    classes: Sequence[str],
    score_thr: float,
    side: int = 720,
    texts: bool = True,
) -> np.ndarray:
    """Draw ground truth on the left and predictions on the right.

    Args:
        sample (Sample): Image with boxes.
        classes (Sequence[str]): Class names.
        score_thr (float): Predictions below are not drawn.
        side (int): Longer side of each half in pixels. Small images are
            enlarged. Defaults to 720.
        texts (bool): Whether to write labels and the header. Defaults to
            True.

    Returns:
        np.ndarray: The picture, has shape (H, W, 3).
    """
    left, scale = load_enlarged(sample.path, side)
    right = left.copy()
    shown = sample.scores >= score_thr
    hits = np.where(shown, match(sample), -1)
    single = len(classes) == 1
    colors = [GREEN if hit >= 0 else MAGENTA for hit in hits]
    # Texts come last, over all boxes, those of the best scores on top.
    order = np.flatnonzero(shown)[::-1]
    for i, box in enumerate(sample.gt_boxes * scale):
        draw_box(left, box, YELLOW, dashed=i not in hits)
    for i in order:
        draw_box(right, sample.boxes[i] * scale, colors[i])
    if texts and not single:
        for box, label in zip(sample.gt_boxes * scale, sample.gt_labels):
            draw_text(left, box, YELLOW, classes[label])
    for i in order if texts else ():
        name = '' if single else f'{classes[sample.labels[i]]} '
        text = f'{name}{sample.scores[i]:.2f}'
        draw_text(right, sample.boxes[i] * scale, colors[i], text)
    if texts:
        found, number = int((hits >= 0).sum()), len(sample.gt_boxes)
        kind = classes[0] if single else 'object'
        bars = [
            [
                (f'{number} {kind} boxes by hand', YELLOW),
                (f'dashed: {number - found} missed', YELLOW),
            ],
            [
                (f'predictions, score >= {score_thr:.2f}:', WHITE),
                (f'{found} right (IoU 0.5)', GREEN),
                (f'{int(shown.sum()) - found} wrong', MAGENTA),
            ],
        ]
        left = np.vstack([header(left.shape[1], bars[0]), left])
        right = np.vstack([header(right.shape[1], bars[1]), right])
    gap = np.full((left.shape[0], GAP, 3), WHITE, np.uint8)
    return np.hstack([left, gap, right])


def contact_sheet(
    samples: Sequence[Sample], classes: Sequence[str], score_thr: float
) -> np.ndarray:
    """Draw all pairs small on one sheet.

    Args:
        samples (Sequence[Sample]): The images.
        classes (Sequence[str]): Class names.
        score_thr (float): Predictions below are not drawn.

    Returns:
        np.ndarray: The sheet, has shape (H, W, 3).
    """
    text = [
        ('left of each pair: boxes by hand', YELLOW),
        ('(dashed: missed)', YELLOW),
        (f'right: predictions, score >= {score_thr:.2f}:', WHITE),
        ('right', GREEN),
        ('wrong', MAGENTA),
    ]
    pairs = [draw_pair(s, classes, score_thr, 400, False) for s in samples]
    return arrange(pairs, 2, text)


def truth_sheet(
    samples: Sequence[Sample], classes: Sequence[str]
) -> np.ndarray:
    """Draw the ground truth of all images small on one sheet.

    Args:
        samples (Sequence[Sample]): The images.
        classes (Sequence[str]): Class names.

    Returns:
        np.ndarray: The sheet, has shape (H, W, 3).
    """
    text = [(name, class_color(i)) for i, name in enumerate(classes)]
    pictures = [draw_truth(s, classes, 400, False) for s in samples]
    return arrange(pictures, 4, text)


def arrange(
    pairs: Sequence[np.ndarray], columns: int, text: Sequence[tuple]
) -> np.ndarray:
    """Put pictures on a sheet below a line of text.

    Args:
        pairs (Sequence[np.ndarray]): The pictures.
        columns (int): Pictures a row at most.
        text (Sequence[tuple]): See :func:`header`.

    Returns:
        np.ndarray: The sheet, has shape (H, W, 3).
    """
    height = max(p.shape[0] for p in pairs) + 2 * GAP
    width = max(p.shape[1] for p in pairs) + 3 * GAP
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    sheet = np.full((rows * height, columns * width, 3), WHITE, np.uint8)
    for i, pair in enumerate(pairs):
        y, x = i // columns * height + GAP, i % columns * width + GAP
        sheet[y : y + pair.shape[0], x : x + pair.shape[1]] = pair
    return np.vstack([header(sheet.shape[1], text), sheet])
