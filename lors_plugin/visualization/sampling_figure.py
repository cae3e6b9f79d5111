"""Boxes and sampling points of the stages of an AdaMixer as a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.patheffects as effects  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from .fonts import font_families  # noqa: E402

# From fine to coarse; further levels take colours of a map.
LEVEL_COLORS = ('#ffe14d', '#ff8c1a', '#f0288c', '#3fa9f5')
MARKERS = 'osD^vP*X<>'
MARGIN = 0.12  # around the image, as a share of its longer side
PANEL = 4.6  # longer side of a panel in inches


@dataclass
class StageView:
    """The content of a panel, in pixels of the original image.

    Attributes:
        stage (int): Number of the stage.
        boxes_in (np.ndarray): Corners at its start, shape (K, 4).
        boxes_out (np.ndarray): Corners at its end, shape (K, 4).
        texts (list[str]): Of each box.
        points (np.ndarray): x and y, shape (K, G, P, 2).
        weights (np.ndarray): Share of each level, shape (K, G, P, L).
    """

    stage: int
    boxes_in: np.ndarray
    boxes_out: np.ndarray
    texts: list[str]
    points: np.ndarray
    weights: np.ndarray

    def only(
        self, group: Optional[int] = None, level: Optional[int] = None
    ) -> 'StageView':
        """Keep some of the points.

        Args:
            group (int, optional): Keep this group of channels.
            level (int, optional): Keep points in which this level counts
                most; the others become NaN, which is not drawn.

        Returns:
            StageView: A new one.
        """
        points, weights = self.points, self.weights
        if group is not None:
            points = points[:, group : group + 1]
            weights = weights[:, group : group + 1]
        if level is not None:
            kept = weights.argmax(-1) == level
            points = np.where(kept[..., None], points, np.nan)
        return replace(self, points=points, weights=weights)


def level_colors(number: int) -> np.ndarray:
    """Return a colour for each level, shape (number, 3)."""
    if number <= len(LEVEL_COLORS):
        return np.array([to_rgb(color) for color in LEVEL_COLORS[:number]])
    return plt.get_cmap('turbo')(np.linspace(0.1, 0.95, number))[:, :3]


def view_limits(
    views: Sequence[StageView],
    size: tuple[int, int],
    zoom: float | None = None,
) -> tuple[float, float, float, float]:
    """Choose the part of the plane that all panels show.

    Without ``zoom`` it is the whole image, with a margin where boxes or
    points lie outside; else the surroundings of the last boxes, so many times
    as large as these. Returns left, top, right and bottom.
    """
    if zoom is not None:
        boxes = views[-1].boxes_out
        low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
        centre, half = (low + high) / 2, (high - low) / 2 * zoom
        half = np.maximum(half, half.max() / 2)
        return (*(centre - half), *(centre + half))
    margin = MARGIN * max(size)
    places = [v.points.reshape(-1, 2) for v in views]
    places += [v.boxes_out.reshape(-1, 2) for v in views]
    places = np.concatenate(places)
    places = places[np.isfinite(places).all(1)]
    low = np.clip(places.min(0), -margin, 0)
    high = np.clip(places.max(0), size, np.add(size, margin))
    return (*low, *high)


def draw_boxes(ax: Axes, view: StageView) -> None:
    """Draw boxes at the start (dashed) and the end of a stage."""
    outline = [effects.withStroke(linewidth=2.6, foreground='#000000b0')]
    for boxes, style, width in (
        (view.boxes_in, (0, (4, 3)), 1.1),
        (view.boxes_out, '-', 1.4),
    ):
        for x1, y1, x2, y2 in boxes:
            look = dict(linewidth=width, linestyle=style, edgecolor='white')
            patch = Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, zorder=3, **look
            )
            patch.set_path_effects(outline)
            ax.add_patch(patch)


def draw_texts(ax: Axes, view: StageView) -> None:
    """Write the text of each box at its upper left corner."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for (x1, y1, _, _), text in zip(view.boxes_out, view.texts):
        ax.text(
            np.clip(x1, left, right),
            np.clip(y1, top + 0.04 * (bottom - top), bottom),
            text,
            family=font_families(text),
            color='white',
            fontsize=8,
            ha='right' if x1 > left + 0.85 * (right - left) else 'left',
            va='bottom',
            zorder=5,
            bbox=dict(facecolor='black', alpha=0.65, pad=1.2, linewidth=0),
        )


def draw_points(ax: Axes, view: StageView, groups: bool) -> int:
    """Draw the points in the colours of their levels.

    With ``groups`` each group has a marker of its own. Returns the number of
    points outside the panel, whose limits are set.
    """
    colors = level_colors(view.weights.shape[-1])
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    hidden = 0
    # Few points are drawn larger.
    area = np.clip((100 / view.points[..., 0].size) ** 0.5, 0.7, 2.5)
    for group in range(view.points.shape[1]):
        x, y = view.points[:, group].reshape(-1, 2).T
        weights = view.weights[:, group].reshape(len(x), -1)
        level, share = weights.argmax(1), weights.max(1)
        inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
        hidden += int((~inside & np.isfinite(x)).sum())
        # A share of 1 / L says that the level hardly counts more.
        clear = (share - 1 / len(colors)) / (1 - 1 / len(colors))
        shades = np.column_stack([colors[level], 0.75 + 0.25 * clear])
        order = np.flatnonzero(inside)
        ax.scatter(
            x[order],
            y[order],
            s=area * (14 + 40 * clear[order]),
            c=shades[order],
            marker=MARKERS[group % len(MARKERS)] if groups else 'o',
            edgecolors=(0, 0, 0, 0.7),
            linewidths=0.4,
            zorder=4,
        )
    return hidden


def draw_shares(ax: Axes, view: StageView) -> None:
    """Draw the share of each level, over all points, in a strip."""
    shares = view.weights.reshape(-1, view.weights.shape[-1]).mean(0)
    start = 0.0
    for share, color in zip(shares, level_colors(len(shares))):
        ax.barh(0, share, left=start, color=color, height=1.0)
        if share > 0.07:
            ax.text(
                start + share / 2,
                0,
                f'{100 * share:.0f} %',
                ha='center',
                va='center_baseline',
                fontsize=7.5,
            )
        start += share
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.5, 0.5)
    ax.axis('off')


def legend_of(
    strides: Sequence[int], groups: int, with_groups: bool
) -> list[Line2D]:
    """Make the entries of the legend."""
    dot = dict(linestyle='', markeredgecolor='black', markeredgewidth=0.4)
    entries = [
        Line2D([], [], marker='o', color=c, label=f'stride {s}', **dot)
        for c, s in zip(level_colors(len(strides)), strides)
    ]
    for g in range(groups if with_groups else 0):
        marker = dict(marker=MARKERS[g % len(MARKERS)], color='white')
        entries.append(Line2D([], [], label=f'group {g}', **marker, **dot))
    frame = dict(color='#444444', linewidth=1.4)
    entries.append(Line2D([], [], label='box at the end', **frame))
    entries.append(
        Line2D([], [], linestyle='--', label='box at the start', **frame)
    )
    return entries


def sampling_figure(
    image: np.ndarray,
    views: Sequence[StageView],
    strides: Sequence[int],
    title: str,
    groups: bool = False,
    zoom: float | None = None,
    columns: int | None = None,
) -> Figure:
    """Draw one panel per stage.

    Args:
        image (np.ndarray): RGB, shape (H, W, 3).
        views (Sequence[StageView]): The stages.
        strides (Sequence[int]): Strides of the levels.
        title (str): Above the picture.
        groups (bool): Whether groups have markers of their own. Defaults to
            False.
        zoom (float, optional): See :func:`view_limits`.
        columns (int, optional): Panels per row. Defaults to None, which means
            three at most.

    Returns:
        Figure: To be saved and closed.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = view_limits(views, (width, height), zoom)
    columns = min(columns or 3, len(views))
    rows = math.ceil(len(views) / columns)
    scale = PANEL / max(right - left, bottom - top)
    across, down = (right - left) * scale, (bottom - top) * scale
    strip, gap, head, foot = 0.2, 0.12, 0.34, 0.7
    cell = (across + gap, down + strip + head)
    total = (max(columns * cell[0] + gap, 5.2), rows * cell[1] + foot + 0.3)
    figure = plt.figure(figsize=total, dpi=130)
    # Grey, so that the colours are those of the points.
    faded = 0.4 * image + 0.6 * image.mean(-1, keepdims=True)
    faded = (40 + 0.62 * faded).astype(np.uint8)
    offset = (total[0] - columns * cell[0] + gap) / 2
    for index, view in enumerate(views):
        row, column = divmod(index, columns)
        x = offset + column * cell[0]
        y = total[1] - 0.3 - row * cell[1] - head - down
        place = (x / total[0], y / total[1])
        share = (across / total[0], down / total[1])
        ax = figure.add_axes((*place, *share), facecolor='#d8d8d8')
        ax.imshow(faded, extent=(0, width, height, 0), zorder=1)
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
        ax.set_xticks([])
        ax.set_yticks([])
        draw_boxes(ax, view)
        hidden = draw_points(ax, view, groups)
        draw_texts(ax, view)
        ax.set_title(
            f'stage {view.stage}',
            fontsize=11,
            loc='left',
            pad=4,
            weight='bold',
        )
        if hidden:
            text = f'{hidden} of {view.points[..., 0].size} points outside'
            ax.set_title(text, fontsize=8, loc='right', pad=4, color='#555555')
        strip_at = (place[0], (y - strip) / total[1])
        draw_shares(
            figure.add_axes((*strip_at, share[0], 0.8 * strip / total[1])),
            view,
        )
    figure.text(
        0.5,
        1 - 0.08 / total[1],
        title,
        family=font_families(title),
        ha='center',
        va='top',
        fontsize=min(11, 115 * total[0] / len(title)),
    )
    entries = legend_of(strides, views[0].points.shape[1], groups)
    figure.legend(
        handles=entries,
        loc='lower center',
        ncols=math.ceil(len(entries) / (1 if columns > 1 else 2)),
        fontsize=9,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.4,
        bbox_to_anchor=(0.5, 0.22 / total[1]),
    )
    figure.text(
        0.5,
        0.08 / total[1],
        'colour: the level that counts most in a point, large: it counts '
        'nearly alone.  bar: shares of the levels',
        ha='center',
        fontsize=8 if columns > 1 else 6,
        color='#555555',
    )
    return figure
