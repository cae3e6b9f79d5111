"""A page in the browser to try a trained detector or classifier on photos.

    python tools/demo.py CONFIG CHECKPOINT [--port 7860] [--samples PATH ...]

Upload a photo or choose a sample; threshold and classes act at once. Of an
AdaMixer or LORS-AdaMixer the sampling points of each stage are shown, of a
model with adapters also what it finds without them. The page is at
http://127.0.0.1:7860, for this machine alone. It needs Gradio.
docs/en/user_guides/demo.md tells more.
"""

import argparse
import os
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from infer import TOP_CLASSES, add_model_arguments, check_numbers, load
from PIL import Image
from tool_utils import user_errors

import lors_plugin  # noqa: F401  (first: it makes mmcv.ops importable)
from lors_plugin.adapters import adapters_of
from lors_plugin.inference import (
    InferenceError,
    Prediction,
    TorchPredictor,
    adapters_off,
    find_sources,
)
from lors_plugin.inference.writers import as_rgb
from lors_plugin.visualization import SamplingRecorder
from lors_plugin.visualization.painter import Painter
from lors_plugin.visualization.sampling_figure import sampling_figure
from lors_plugin.visualization.sampling_views import (
    Sampling,
    choose_queries,
    record_sampling,
    stage_views,
)

SAMPLES = 8  # of the test set, where --samples names none
# Longer sides of pictures in pixels: what a page shows well.
SIDES = (720, 1600)
ALL = 'all'
FORMATS = 'JPEG, PNG, WebP, TIFF or BMP'
HINT = """
A query reads the feature maps at the points shown, in each stage anew. The
**colour** of a point is the level that counts most there, a **large** point
is one in which that level counts nearly alone. The **dashed** box is that at
the start of the stage, the **solid** one that at its end.
"""


@dataclass
class Look:
    """All that was computed for a photo.

    Attributes:
        name (str): Of the file.
        image (np.ndarray): RGB.
        found (Prediction): What the model predicts.
        plain (Prediction, optional): The same without adapters.
        sampling (Sampling, optional): Of an AdaMixer.
        seconds (float): That the model took.
    """

    name: str
    image: np.ndarray
    found: Prediction
    plain: Prediction | None
    sampling: Sampling | None
    seconds: float


class Demo:
    """Predict and draw for the page; errors are :class:`InferenceError`.

    Args:
        predictor (Predictor): The model, perhaps with tiles.
        max_megapixels (float): Larger photos are refused unread.
        score_thr (float): Where the threshold starts.
    """

    def __init__(
        self, predictor, max_megapixels: float = 25, score_thr: float = 0.3
    ) -> None:
        self.predictor = predictor
        self.max_megapixels, self.score_thr = max_megapixels, score_thr
        self.painter = Painter(predictor.classes)
        model = getattr(predictor, 'model', None)
        self.adapters = 0 if model is None else len(adapters_of(model))
        # Points of tiles would be those of many pictures.
        self.samples_points = isinstance(predictor, TorchPredictor)
        if self.samples_points:
            try:
                SamplingRecorder(model)
            except TypeError:
                self.samples_points = False
        decoder = getattr(model, 'decoder', None)
        self.stages = len(getattr(decoder, 'stages', ()))

    def check(self, path: str) -> None:
        """Refuse what is no image, or too large, before it is decoded."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            width = height = 0
        except (OSError, SyntaxError, ValueError):
            raise InferenceError(
                f'{Path(path).name} is no image of a known format, or it is '
                f'damaged. Take a {FORMATS} file.'
            ) from None
        megapixels = width * height / 1e6
        if not megapixels or megapixels > self.max_megapixels:
            size = f' ({width} x {height})' if megapixels else ''
            raise InferenceError(
                f'{Path(path).name} has too many pixels{size}; '
                f'{self.max_megapixels:g} million are allowed. Make it '
                'smaller, or start the page with a larger --max-megapixels.'
            )

    def look(self, path: str) -> Look:
        """Run the model on a photo, with and without adapters."""
        self.check(path)
        image = self.predictor.read(path)
        start = time.perf_counter()
        sampling = plain = None
        if self.samples_points:
            sampling = record_sampling(self.predictor, image)
            found = sampling.prediction
        else:
            (found,) = self.predictor([image])
        seconds = time.perf_counter() - start
        if self.adapters:
            with adapters_off(self.predictor.model):
                (plain,) = self.predictor([image])
        name = Path(path).name
        return Look(name, as_rgb(image), found, plain, sampling, seconds)

    def picture(self, look: Look, found: Prediction) -> np.ndarray:
        """Draw predictions on the photo, in a size for a page."""
        height, width = look.image.shape[:2]
        scale = np.clip(max(height, width), *SIDES) / max(height, width)
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        image = np.asarray(Image.fromarray(look.image).resize(size))
        boxes = None if found.boxes is None else found.boxes * scale
        resized = Prediction(found.labels, found.scores, boxes)
        return self.painter.prediction(image, resized)

    def select(
        self, found: Prediction, score_thr: float, classes: list
    ) -> Prediction:
        """Keep what the controls of the page ask for."""
        labels = self.predictor.labels_of(classes) if classes else None
        number = None if self.predictor.detects else TOP_CLASSES
        return found.select(score_thr, labels, number)

    def show(self, look: Look, score_thr: float, classes: list) -> tuple:
        """Draw and describe what the model found.

        Returns:
            tuple: The picture, that without adapters or None, a sentence,
            and the lines of a table or None.
        """
        found = self.select(look.found, score_thr, classes)
        what = 'boxes' if self.predictor.detects else 'classes'
        height, width = look.image.shape[:2]
        text = (
            f'**{len(found)} {what}** with a score of at least '
            f'{score_thr:.2f}, {look.seconds:.2f} s for {width} x {height} '
            'pixels'
        )
        plain = None
        if look.plain is not None:
            without = self.select(look.plain, score_thr, classes)
            text += f'; {len(without)} with the adapters off'
            plain = self.picture(look, without)
        table = [
            [
                self.predictor.name(label),
                round(float(score), 3),
                '' if box is None else ', '.join(f'{v:.0f}' for v in box),
            ]
            for label, score, box in zip(
                found.labels,
                found.scores,
                [None] * len(found) if found.boxes is None else found.boxes,
            )
        ]
        # A table without lines is an error in the browser.
        return self.picture(look, found), plain, text, table or None

    def points(
        self, look: Look, stage: int, level: str, group: str, number: int
    ) -> np.ndarray:
        """Draw the boxes and sampling points of one stage.

        Args:
            look (Look): Of an AdaMixer.
            stage (int): Counted from 0.
            level (str): 'all' or a stride.
            group (str): 'all' or the number of a group, from 0.
            number (int): Of queries, the best of each object.
        """
        records, factors = look.sampling.records, look.sampling.factors
        last = records[-1]
        queries = choose_queries(
            last.boxes_out[0].numpy(),
            last.scores[0].amax(-1).numpy(),
            number,
            0.0,
        )
        names = [self.predictor.name(i) for i in range(last.scores.shape[-1])]
        (view,) = stage_views(records, factors, [stage], queries, names)
        groups = view.points.shape[1]
        view = view.only(
            None if group == ALL else int(group),
            None if level == ALL else last.strides.index(int(level)),
        )
        figure = sampling_figure(
            look.image,
            [view],
            last.strides,
            f'{len(queries)} of {last.scores.shape[1]} queries',
            groups=group == ALL and groups > 1,
            columns=1,
        )
        figure.canvas.draw()
        picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        plt.close(figure)
        return picture


def build_page(demo: Demo, samples: list, title: str, max_upload: int = 20):
    """Build the page.

    Args:
        demo (Demo): What the page shows.
        samples (list[str]): Photos to choose from.
        title (str): Heading of the page.
        max_upload (int): Size of the largest file in MB, which the page says.

    Returns:
        gradio.Blocks: To be launched.
    """
    import gradio as gr

    names = list(demo.predictor.classes)
    start = 'Upload a photo or choose a sample.'
    limits = (
        f'{FORMATS}, up to {max_upload} MB and {demo.max_megapixels:g} '
        'million pixels; uploads are deleted after an hour.'
    )
    # No button that sends the picture elsewhere.
    drawn = dict(
        format='jpeg', interactive=False, buttons=['download', 'fullscreen']
    )
    model = dict(concurrency_id='model', concurrency_limit=1)
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        look = gr.State()
        gr.Markdown(f'## {title}')
        with gr.Row():
            with gr.Column(scale=2):
                photo = gr.Image(
                    label='Photo',
                    type='filepath',
                    image_mode=None,
                    sources=['upload', 'clipboard'],
                    elem_id='photo',
                    height=320,
                )
                # As it was uploaded: Gradio would decode it here, and fail
                # without a sentence.
                photo.preprocess = lambda file: file and file.path
                if samples:
                    gr.Examples(samples, photo, label='Samples')
                threshold = gr.Slider(
                    0,
                    1,
                    demo.score_thr,
                    step=0.01,
                    label='Score threshold',
                    elem_id='threshold',
                )
                classes = gr.Dropdown(
                    names,
                    label='Classes (none: all)',
                    multiselect=True,
                    visible=len(names) > 1,
                )
            with gr.Column(scale=3):
                text = gr.Markdown(f'{start} {limits}', elem_id='text')
                picture = gr.Image(
                    label='Adapters on' if demo.adapters else 'Predictions',
                    **drawn,
                    elem_id='picture',
                )
                plain = gr.Image(
                    label='Adapters off',
                    **drawn,
                    visible=bool(demo.adapters),
                )
        points = gr.Accordion(
            'Where the queries look', visible=demo.samples_points
        )
        with points, gr.Row():
            with gr.Column(scale=2):
                stage = gr.Slider(
                    0,
                    max(demo.stages - 1, 1),
                    max(demo.stages - 1, 0),
                    step=1,
                    label='Stage',
                    elem_id='stage',
                )
                number = gr.Slider(1, 20, 3, step=1, label='Queries')
                level = gr.Dropdown(
                    [ALL, *strides_of(demo)],
                    value=ALL,
                    label='Level (stride)',
                )
                group = gr.Dropdown(
                    [ALL, *groups_of(demo)], value=ALL, label='Group'
                )
                gr.Markdown(HINT)
            with gr.Column(scale=3):
                sampled = gr.Image(
                    label='Boxes and sampling points',
                    **drawn,
                    elem_id='sampled',
                )
        with gr.Accordion('Table', open=False):
            table = gr.Dataframe(
                headers=['class', 'score', 'x1, y1, x2, y2'],
                interactive=False,
            )

        def run(path):
            """Compute; a mistake leaves a sentence and an empty page."""
            if path is None:
                return None, f'{start} {limits}'
            try:
                return demo.look(path), 'Drawing ...'
            except (InferenceError, RuntimeError) as error:
                # Uploads lie in a folder that says nothing to the visitor.
                text = str(error).replace(path, Path(path).name)
                return None, f'**This photo cannot be used.** {text}'

        def show(found, score_thr, chosen, said):
            if found is None:
                return None, None, said, None
            return demo.show(found, score_thr, chosen)

        def draw_points(found, *controls):
            if found is None or found.sampling is None:
                return None
            return demo.points(found, *controls)

        shown = [picture, plain, text, table]
        asked = [look, threshold, classes, text]
        controls = [look, stage, level, group, number]
        photo.change(run, photo, [look, text], api_name=False, **model).then(
            show, asked, shown, api_name=False
        ).then(draw_points, controls, sampled, api_name=False)
        quick = dict(
            api_name=False, trigger_mode='always_last', show_progress='hidden'
        )
        for control in (threshold, classes):
            control.change(show, asked, shown, **quick)
        for control in controls[1:]:
            control.change(draw_points, controls, sampled, **quick)
    return page


def strides_of(demo: Demo) -> list[str]:
    """Return the strides of an AdaMixer's levels."""
    decoder = getattr(getattr(demo.predictor, 'model', None), 'decoder', None)
    return [str(stride) for stride in getattr(decoder, 'strides', ())]


def groups_of(demo: Demo) -> list[str]:
    """Return the numbers of an AdaMixer's groups of channels."""
    if not demo.samples_points:
        return []
    stage = demo.predictor.model.decoder.stages[0]
    return [str(group) for group in range(stage.sampling.num_groups)]


def find_samples(cfg, paths: list) -> list[str]:
    """Find photos to offer: those named, or some of the test set."""
    if paths:
        found = find_sources(paths)
        return [str(s.path) for s in found if s.kind == 'image']
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    prefix = dataset.get('data_prefix') or {}
    if not isinstance(prefix, str):
        prefix = prefix.get('img') or prefix.get('img_path') or ''
    folder = Path(dataset.get('data_root') or '', prefix)
    if not prefix or not folder.is_dir():
        return []
    files = sorted(folder.iterdir())
    images = (p for p in files if p.suffix.lower() in ('.jpg', '.png'))
    return [str(path) for path in islice(images, SAMPLES)]


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        '--samples',
        nargs='+',
        default=[],
        metavar='PATH',
        help='photos, folders or patterns to choose from (default: the first '
        f"{SAMPLES} images of the config's test set, where it is there)",
    )
    add(
        '--host',
        default='127.0.0.1',
        help='where to listen; 0.0.0.0 lets every machine of the network '
        'use the page (default: %(default)s)',
    )
    add('--port', type=int, help='(default: the first free one from 7860 on)')
    add(
        '--max-upload',
        type=int,
        default=20,
        metavar='MB',
        help='largest file (default: %(default)s MB)',
    )
    add(
        '--max-megapixels',
        type=float,
        default=25,
        metavar='N',
        help='largest photo, in million pixels (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    check_numbers(parser, args, 'batch_size', 'tile', 'max_upload')
    return args


def prepare(argv=None):
    """Load the model and build the page.

    Returns:
        tuple: The page, and options of its ``launch``.
    """
    args = parse_args(argv)
    # Gradio sends statistics home otherwise.
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    with user_errors('', args.debug, (ValueError, OSError)):
        try:
            import gradio as gr
        except ImportError as error:
            raise InferenceError(
                f'the page needs Gradio ({error}): pip install "gradio>=6" '
                '"huggingface_hub<1"'
            ) from None
        predictor = load(args)
        demo = Demo(predictor, args.max_megapixels, args.score_thr)
        samples = find_samples(predictor.cfg, args.samples)
    # Of Gradio about what it is built on.
    warnings.filterwarnings('ignore', module=r'gradio\.')
    page = build_page(demo, samples, Path(args.config).stem, args.max_upload)
    # Fonts of the system: Gradio's own are fetched from the internet.
    theme = gr.themes.Default(
        font=['system-ui', 'sans-serif'], font_mono=['monospace']
    )
    options = dict(
        server_name=args.host,
        server_port=args.port,
        max_file_size=f'{args.max_upload}mb',
        theme=theme,
        css='h2 {overflow-wrap: anywhere}',  # names of configs on phones
        footer_links=['gradio', 'settings'],  # there is no API
        ssr_mode=False,
        share=False,
        quiet=True,
    )
    return page, options


def main(argv=None):
    """Serve the page until Ctrl-C."""
    page, options = prepare(argv)
    with user_errors('', False, (InferenceError,)):
        try:
            _, address, _ = page.launch(prevent_thread_lock=True, **options)
        except OSError as error:
            raise InferenceError(
                f'{options["server_name"]}:{options["server_port"] or ""} '
                f'cannot be listened on; choose another --port ({error})'
            ) from error
    print(f'the page is at {address} (Ctrl-C ends it)', flush=True)
    page.block_thread()
    return 0


if __name__ == '__main__':
    sys.exit(main())
