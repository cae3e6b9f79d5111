"""Draw boxes, class names and headers on images."""

from collections.abc import Sequence
from typing import Optional

import numpy as np
from matplotlib.colors import hsv_to_rgb
from mmdet.visualization import DetLocalVisualizer

from lors_plugin.inference.prediction import Prediction, name_of

from .fonts import columns, font_families

# RGB
WHITE, DARK = (255, 255, 255), (40, 40, 40)
HEADER = 34  # height in pixels
# Pixels of the longer side of an image for which boxes are two pixels wide.
USUAL_SIDE = 1000


class Painter:
    """Draw by MMDetection's visualizer; pictures are RGB.

    Args:
        classes (Sequence[str]): Class names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.visualizer = DetLocalVisualizer()
        # Of boxes; headers put a font of even widths first.
        self.families = font_families(''.join(classes))
        # Bright, and neighbours differ most.
        hues = (30 + 111 * np.arange(max(len(classes), 1))) % 180 / 180
        colors = [hsv_to_rgb((hue, 2 / 3, 1)) for hue in hues]
        self.colors = [
            tuple(map(int, color)) for color in np.multiply(colors, 255)
        ]

    def name(self, label: int) -> str:
        """Return the name of a class, its number where there is none."""
        return name_of(self.classes, label)

    def color(self, label: int) -> tuple[int, int, int]:
        """Return the colour of a class."""
        return self.colors[label % len(self.colors)]

    def boxes(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        colors: Sequence[tuple],
        texts: Sequence[str] = (),
        dashed: Sequence[bool] = (),
        scale: float = 1.0,
    ) -> np.ndarray:
        """Draw boxes, in pixels of the image, the last ones on top.

        Args:
            image (np.ndarray): RGB, shape (H, W, 3).
            boxes (np.ndarray): Corners, shape (N, 4).
            colors (Sequence[tuple]): Of each box.
            texts (Sequence[str]): Of each box. Defaults to ().
            dashed (Sequence[bool]): Whether its line is. Defaults to ().
            scale (float): Of lines and texts. Defaults to 1.

        Returns:
            np.ndarray: The picture.
        """
        if not len(boxes):
            return image
        height, width = image.shape[:2]
        boxes = np.clip(boxes, 0, [width - 1, height - 1] * 2)
        styles = ['--' if d else '-' for d in dashed] or '-'
        self.visualizer.set_image(image)
        self.visualizer.draw_bboxes(boxes, colors, styles, 2 * scale, alpha=1)
        for (x, y, _, _), color, text in zip(boxes, colors, texts):
            ground = dict(facecolor=np.divide(color, 255), pad=1, linewidth=0)
            left = x < 0.85 * width  # to the right, a text would be cut off
            self.visualizer.draw_texts(
                text,
                np.array([x if left else width - 1, y]),
                8 * scale,
                'k',
                horizontal_alignments='left' if left else 'right',
                font_families=[self.families],
                bboxes=ground,
            )
        return self.visualizer.get_image()

    def header(self, width: int, parts: Sequence[tuple]) -> np.ndarray:
        """Write texts in their colours on a bar above a picture."""
        total = sum(columns(text) + 2 for text, _ in parts)
        advance = min(8.4, (width - 16) / total)  # pixels of a character
        size = advance / 0.602 * 72 / self.visualizer.dpi
        bar = np.full((HEADER, width, 3), DARK, np.uint8)
        self.visualizer.set_image(bar)
        x = 8.0
        for text, color in parts:
            self.visualizer.draw_texts(
                text,
                np.array([x, HEADER / 2]),
                size,
                color,
                vertical_alignments='center',
                font_families=[['monospace', *self.families[1:]]],
            )
            x += (columns(text) + 2) * advance
        return self.visualizer.get_image()

    def prediction(
        self,
        image: np.ndarray,
        found: Prediction,
        labels: bool = True,
        scale: Optional[float] = None,
    ) -> np.ndarray:
        """Draw boxes, or write the classes of a classifier above the image.

        Args:
            image (np.ndarray): RGB, shape (H, W, 3).
            found (Prediction): What to draw.
            labels (bool): Whether to write class names and scores beside
                boxes. Defaults to True.
            scale (float, optional): Of lines and texts. Defaults to None,
                which follows the size of the image.

        Returns:
            np.ndarray: The picture, :data:`HEADER` pixels higher for
            classifiers.
        """
        if scale is None:
            scale = max(max(image.shape[:2]) / USUAL_SIDE, 0.8)
        # The best ones on top.
        order = range(len(found) - 1, -1, -1)
        texts = [
            f'{self.name(found.labels[i])} {found.scores[i]:.2f}'
            for i in order
        ]
        colors = [self.color(found.labels[i]) for i in order]
        if found.boxes is not None:
            texts = texts if labels else ()
            boxes = found.boxes[::-1]
            return self.boxes(image, boxes, colors, texts, scale=scale)
        parts = list(zip(texts, colors))[::-1]
        parts = parts or [('no class with such a score', WHITE)]
        return np.vstack([self.header(image.shape[1], parts), image])
