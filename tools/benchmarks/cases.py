"""The table of cases, and what each of them computes.

A builder takes a size and the names of implementations and returns at least
those, with the same inputs and weights. Cases call public functions and
modules only, so that they measure any commit of this package.
"""

import contextlib
import copy
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import original
import torch
import torch.nn.functional as F
from harness import GateError, Implementation
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from lors_plugin.adapters import inject_adapters
from lors_plugin.models import ParameterNet
from lors_plugin.ops import adaptive_mixing, sampling_3d, share_levels
from lors_plugin.registry import MODELS
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

# Implementations of the operators, and what LORS_PLUGIN_BACKEND is for them.
# On a CPU 'auto' takes C++ where an operator has it.
BACKENDS = dict(
    reference='reference', torch='torch', cpu='auto', triton='triton'
)
FLOAT32_ONLY = ('cpu', 'products')
NEVER_FLOAT64 = (*FLOAT32_ONLY, 'triton', 'compiled')
CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
DETECTORS = dict(
    adamixer='adamixer/adamixer_r50_8xb2-1x_coco.py',
    lors='lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
)
TINY_GHOST = dict(
    width=1.0,
    rows=(((3, 16, 16, 0, 1),), ((5, 24, 16, 0.25, 2), (3, 24, 16, 0, 1))),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a case, that is the input of a builder.

    Attributes:
        model (str): One of the case.
        batch (int, optional): Images.
        queries (int, optional): Per image.
        device (str): Where to compute.
        dtype (str): Of inputs and weights, 'float32' or 'float64'.
        quick (bool): Whether to take sizes that only try the case.
        threads (int): Of libraries that have threads of their own.
    """

    model: str
    batch: Optional[int]
    queries: Optional[int]
    device: str = 'cpu'
    dtype: str = 'float32'
    quick: bool = False
    threads: int = 1

    @property
    def label(self) -> str:
        batch = self.batch and f'batch {self.batch}'
        queries = self.queries and f'{self.queries} queries'
        return ', '.join(filter(None, (self.model, batch, queries)))

    @property
    def image(self) -> tuple[int, int]:
        """Images of 800x1333, padded to a multiple of 32."""
        return (64, 96) if self.quick else (800, 1344)

    def to(self, *tensors: Tensor) -> list[Tensor]:
        dtype = getattr(torch, self.dtype)
        return [t.to(self.device, dtype).requires_grad_() for t in tensors]


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        build (Callable): Takes a :class:`Size` and names, returns
            implementations by name. Its docstring describes the case.
        implementations (tuple[str]): The first is the reference.
        models (tuple[str]): Whose sizes there are; the default is all.
        batch_sizes (tuple): Default of ``--batch-sizes``.
        queries (tuple): Default of ``--queries``.
        modes (tuple[str]): Default of ``--modes``.
        baseline (str): Ratios refer to it.
        tolerance (float): Relative error of outputs in float32.
        gradient_tolerance (float): The same for gradients.
        in_float64 (bool): Whether gradients are checked in float64, where
            two right ways to compute them differ in float32.
        rate (bool): Whether images per second are reported.
        memory (bool): Whether memory is measured.
    """

    build: Callable[[Size, Sequence[str]], dict[str, Implementation]]
    implementations: tuple[str, ...]
    models: tuple[str, ...] = tuple(DETECTORS)
    batch_sizes: tuple[Optional[int], ...] = (1, 2)
    queries: tuple[Optional[int], ...] = (100,)
    modes: tuple[str, ...] = ('forward', 'full')
    baseline: str = 'original'
    tolerance: float = 1e-3
    gradient_tolerance: float = 1e-3
    in_float64: bool = False
    rate: bool = False
    memory: bool = True


def refusal(name: str, device: str, dtype: str) -> str:
    """Say why an implementation cannot run, '' if it can."""
    if name == 'compiled' and not device.startswith('cuda'):
        return 'compiled is measured on GPUs'
    if name in FLOAT32_ONLY and dtype != 'float32':
        return f'{name} computes in float32 only'
    if name not in BACKENDS:
        return ''
    x = torch.zeros(1, 1, 1, 16, 16, device=device)
    x = x.to(getattr(torch, dtype))
    try:
        adaptive_mixing(x, x.new_zeros(1, 1, 1, 512), backend=name)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ''


def by_backend(run: Callable, leaves: dict, **options) -> dict:
    """The package's own implementations, which share one function."""
    return {
        name: Implementation(name, run, leaves, backend=backend, **options)
        for name, backend in BACKENDS.items()
    }


def compiled(run: Callable, leaves: dict, **options) -> dict:
    """Compile the reference by PyTorch, with its defaults."""

    @functools.cache
    def program():  # importing the compiler takes seconds
        return torch.compile(run, dynamic=False)

    return dict(
        compiled=Implementation(
            'compiled',
            lambda: program()(),
            leaves,
            backend='reference',
            **options,
        )
    )


def implementations(leaves: dict, /, **functions: Callable) -> dict:
    """Implementations of other names, on the same tensors."""
    return {
        name: Implementation(name, function, leaves)
        for name, function in functions.items()
    }


# --- the decoder and its operators


def model_config(size: Size):
    """The model of a config, without weights to fetch."""
    config = Config.fromfile(CONFIGS / DETECTORS[size.model]).model
    config.backbone.init_cfg = None
    if size.quick:
        config.backbone.update(depth=18, base_channels=8)
        config.neck.update(in_channels=[8, 16, 32, 64], out_channels=32)
        config.query_generator.embed_dims = 32
        config.decoder.update(
            num_classes=3,
            num_stages=2,
            embed_dims=32,
            in_points=4,
            out_points=8,
            num_heads=2,
            feedforward_channels=16,
        )
    return config


def build_model(config: dict, size: Size, scope: str = 'mmdet') -> nn.Module:
    """Build a model with random weights."""
    with DefaultScope.overwrite_default_scope(scope):
        model = randomize(MODELS.build(config))
    for module in model.modules():
        # Points spread over the boxes, as those of a trained model do.
        if hasattr(module, 'offsets'):
            module.init_weights()
            nn.init.normal_(module.offsets.weight, std=0.02)
    return model.to(size.device, getattr(torch, size.dtype))


def random_boxes(size: Size) -> Tensor:
    """Boxes of all sizes and places, as late stages have them.

    Returns:
        Tensor: (x, y, z, r), shape (B, N, 4).
    """
    lead, (height, width) = (size.batch, size.queries), size.image
    centre = torch.rand(*lead, 2) * torch.tensor([width, height])
    z = 3 + torch.rand(*lead, 1) * (torch.tensor(height).log2() - 3)
    return torch.cat([centre, z, torch.randn(*lead, 1) * 0.5], dim=-1)


def feature_levels(size: Size, channels: int, strides: Sequence[int]) -> list:
    """Levels of shape (B, channels, H_l, W_l), smooth as real ones are.

    In white noise the smallest step of a point changes everything, so that
    six stages would turn rounding errors into other results.
    """
    return [
        F.interpolate(
            torch.randn(
                size.batch,
                channels,
                *(max(n // (4 * s), 2) for n in size.image),
            ),
            size=[n // s for n in size.image],
            mode='bilinear',
        )
        for s in strides
    ]


@contextlib.contextmanager
def switched_on(modules: Sequence[nn.Module], option: str):
    """Set an option of modules for a while."""
    for module in modules:
        setattr(module, option, True)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, option, False)


def mixing(size: Size, names: Sequence[str]) -> dict:
    """Adaptive mixing of all stages: generator, mixing, output projection.

    'recompute' is ``recompute=True``; 'products' is the four matrix products
    alone, which no implementation can do without.
    """
    decoder = build_model(model_config(size).decoder, size)
    module = decoder.mixing
    torch.manual_seed(0)
    inputs, leaves = [], dict(module.named_parameters())
    for stage in range(decoder.num_stages):
        groups, points = decoder.num_groups[stage], decoder.in_points[stage]
        shape = groups, points, decoder.feat_channels // groups
        x = torch.randn(size.batch, size.queries, *shape)
        query = torch.randn(size.batch, size.queries, decoder.embed_dims)
        inputs.append(size.to(x, query))
        leaves.update({f'x {stage}': inputs[-1][0]})
        leaves.update({f'query {stage}': inputs[-1][1]})

    def stages(mix):
        return [mix(*pair, stage) for stage, pair in enumerate(inputs)]

    def run():
        # Up to commit 908f70c, stages of one pass share work in this way.
        one_pass = getattr(module, 'one_pass', None)
        return stages(one_pass() if one_pass else module)

    def recompute():
        modules = [m for m in module.modules() if hasattr(m, 'recompute')]
        with switched_on(modules, 'recompute'):
            return run()

    found = by_backend(run, leaves) | compiled(run, leaves)
    found |= implementations(
        leaves,
        original=lambda: stages(partial(original.mixing, module)),
        recompute=recompute,
    )
    if 'products' in names:
        found['products'] = products(decoder, inputs)
    return found


def products(decoder: nn.Module, inputs: list) -> Implementation:
    """The matrix products of mixing, on random matrices."""
    leaves = {}
    for stage, (x, query) in enumerate(inputs):
        groups, points, width = x.shape[2:]
        rows, count = decoder.out_points[stage], x[..., 0, 0].numel()
        numbers = groups * (width**2 + rows * points)
        for name, shape in dict(
            generator=(numbers, query.shape[-1]),
            channel=(count, width, width),
            spatial=(count, rows, points),
            mixed=(*x.shape[:2], groups * rows * width),
            projection=(query.shape[-1], groups * rows * width),
        ).items():
            (leaves[name, stage],) = [torch.randn(shape).to(x)]
        leaves['x', stage], leaves['query', stage] = x, query
    for leaf in leaves.values():
        leaf.requires_grad_()

    def run():
        outputs = []
        for stage in range(len(inputs)):
            x = leaves['x', stage].flatten(0, 2)
            outputs += [
                F.linear(leaves['query', stage], leaves['generator', stage]),
                x @ leaves['channel', stage],
                leaves['spatial', stage] @ x,
                F.linear(leaves['mixed', stage], leaves['projection', stage]),
            ]
        return outputs

    return Implementation('products', run, leaves, exact=False)


def sampling(size: Size, names: Sequence[str]) -> dict:
    """3D sampling by all stages of a decoder, which read the same levels."""
    decoder = build_model(model_config(size).decoder, size)
    strides = decoder.strides
    torch.manual_seed(0)
    feats = size.to(*feature_levels(size, decoder.feat_channels, strides))
    points = []
    for stage in decoder.stages:
        content = torch.randn(size.batch, size.queries, decoder.embed_dims)
        with torch.no_grad():
            inputs = size.to(content, random_boxes(size))
            each = original.sampling_points(stage.sampling, *inputs)
        points += size.to(each)
    leaves = {f'level {i}': feat for i, feat in enumerate(feats)}
    leaves.update({f'points {i}': each for i, each in enumerate(points)})

    def run():
        try:
            levels = [share_levels(feats)] * len(points)
        except TypeError:  # up to commit 908f70c, which wants all sizes
            calls = [tuple(each.shape[1:4]) for each in points]
            levels = share_levels(feats, strides, calls)
        return [sampling_3d(*pair, strides) for pair in zip(levels, points)]

    def theirs():
        return [original.sampling(feats, each, strides) for each in points]

    found = by_backend(run, leaves) | compiled(run, leaves)
    return found | implementations(leaves, original=theirs)


def decoder(size: Size, names: Sequence[str]) -> dict:
    """The whole decoder: from levels and queries to classes and boxes.

    'with_cp' is ``with_cp=True``.
    """
    module = build_model(model_config(size).decoder, size)
    torch.manual_seed(0)
    feats = size.to(
        *feature_levels(size, module.feat_channels, module.strides)
    )
    (content,) = size.to(
        torch.randn(size.batch, size.queries, module.embed_dims)
    )
    boxes = size.to(random_boxes(size))[0].detach()
    leaves = {f'level {i}': feat for i, feat in enumerate(feats)}
    leaves.update(module.named_parameters(), content=content)

    def run():
        return list(module(feats, content, boxes))

    def theirs():
        return list(original.run_decoder(module, feats, content, boxes))

    def with_cp():
        with switched_on([module], 'with_cp'):
            return run()

    found = by_backend(run, leaves) | compiled(run, leaves)
    return found | implementations(leaves, original=theirs, with_cp=with_cp)


def detector(size: Size, names: Sequence[str]) -> dict:
    """A whole detector: inference, and training steps with AdamW.

    Backbone, neck, queries and decoder of a config with R50 on random images
    of 800x1333, padded to 800x1344. 'full' is losses, backward and optimizer.
    """
    config = model_config(size)
    config.query_generator.num_queries = size.queries
    module = build_model(config, size).train()
    torch.manual_seed(0)
    images = size.to(torch.randn(size.batch, 3, *size.image))[0].detach()
    samples = annotations(size, module.decoder.num_classes)

    def run():
        if torch.is_grad_enabled():
            return [sum(module.loss(images, samples).values())]
        results = module.predict(images, samples)
        return [result.pred_instances.scores for result in results]

    def theirs():
        with original.as_original(module.decoder):
            return run()

    leaves, options = trained(module)
    return dict(
        by_backend(run, leaves, **options) | compiled(run, leaves, **options),
        original=Implementation('original', theirs, leaves, **options),
    )


def trained(model: nn.Module) -> tuple[dict, dict]:
    """Parameters that train, and a step that takes time and no effect."""
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.0, weight_decay=0.0)
    return leaves, dict(finish=optimizer.step, joint=True)


def annotations(size: Size, classes: int) -> list:
    """Data samples with seven boxes per image."""
    from mmdet.structures import DetDataSample

    height, width = size.image
    shape = height, width if size.quick else 1333
    samples = []
    for _ in range(size.batch):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=shape,
                ori_shape=shape,
                batch_input_shape=size.image,
                scale_factor=(1.0, 1.0),
            )
        )
        scale = torch.tensor([width, height])
        first = torch.rand(7, 2) * scale * 0.7
        extent = torch.rand(7, 2) * scale * 0.25 + 4
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([first, first + extent], dim=1),
            labels=torch.randint(classes, (7,)),
        )
        samples.append(sample.to(size.device))
    return samples


# --- ParameterNet


class Classifier(nn.Module):
    """ParameterNet up to the scores, with the head of the paper."""

    def __init__(self, size: Size, num_experts: int) -> None:
        super().__init__()
        arch = TINY_GHOST if size.quick else size.model
        self.backbone = ParameterNet(
            arch, num_experts=num_experts, routing='sigmoid_linear'
        )
        self.hidden = nn.Conv2d(self.backbone.out_channels[0], 1280, 1)
        self.act = nn.Hardswish()
        self.fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of shape (B, 1000)."""
        x = F.adaptive_avg_pool2d(self.backbone(images)[-1], 1)
        return self.fc(self.act(self.hidden(x)).flatten(1))


def build_classifier(size: Size, num_experts: int = 4) -> nn.Module:
    """A classifier whose scores depend on the image.

    With random statistics of norms all images would look alike, so norms
    see some first.
    """
    model = randomize(Classifier(size, num_experts))
    model = model.to(size.device, getattr(torch, size.dtype))
    torch.manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for _ in range(4):
            model.train()(*size.to(torch.randn(4, 3, 96, 96)))
    for norm in norms:
        norm.momentum = 0.0  # training steps change nothing from here on
    return model


def parameternet(size: Size, names: Sequence[str]) -> dict:
    """ParameterNet as a classifier: inference, and training with AdamW.

    224x224. 'converted' is the model after ``reparameterize``, 'ghost' a
    GhostNet of the same width, that is one kernel per layer.
    """
    model = build_classifier(size)
    torch.manual_seed(0)
    side = 32 if size.quick else 224
    images = torch.randn(size.batch, 3, side, side)
    images = size.to(images)[0].detach()
    labels = torch.randint(1000, (size.batch,)).to(size.device)

    def run(model):
        if torch.is_grad_enabled():
            return [F.cross_entropy(model.train()(images), labels)]
        return [model.eval()(images)]

    def theirs():
        with original.original_convolutions():
            return run(model)

    leaves, options = trained(model)
    found = by_backend(partial(run, model), leaves, **options)
    found['original'] = Implementation('original', theirs, leaves, **options)
    if 'converted' in names:
        converted = copy.deepcopy(model).eval()
        reparameterize(converted)
        found['converted'] = Implementation(
            'converted',
            lambda: [converted(images)],
            dict(converted.named_parameters()),
            trains=False,
        )
    if 'ghost' in names:
        plain = build_classifier(size, num_experts=1)
        leaves, options = trained(plain)
        found['ghost'] = Implementation(
            'ghost', partial(run, plain), leaves, exact=False, **options
        )
    return found


# --- adapters


def vit_adapters(size: Size, names: Sequence[str]) -> dict:
    """ViT-B/16 with RepAdapter: inference, and training with AdamW.

    224x224. 'adapted' trains the adapters alone, 'merged' is the same model
    after ``reparameterize``, 'plain' the model without adapters, all of whose
    weights train.
    """
    config = dict(type='VisionTransformer', arch='b', img_size=224)
    if size.quick:
        arch = dict(
            embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64
        )
        config.update(arch=arch, img_size=32)
    torch.manual_seed(0)
    plain = build_model(config, size, 'mmpretrain')
    plain.eval()  # returns nothing; without dropout, which would differ
    adapted = copy.deepcopy(plain)
    inject_adapters(adapted, module='')
    adapted = randomize(adapted).to(size.device)
    adapted.eval()
    plain.load_state_dict(
        {n: adapted.state_dict()[n] for n in plain.state_dict()}
    )
    merged = copy.deepcopy(adapted)
    reparameterize(merged)
    side = config['img_size']
    images = size.to(torch.randn(size.batch, 3, side, side))[0].detach()

    def make(name, model, exact=True):
        leaves, options = dict(model.named_parameters()), {}
        if name != 'merged':
            leaves, options = trained(model)
        return Implementation(
            name,
            lambda: [model(images)[-1]],
            leaves,
            exact=exact,
            trains=name != 'merged',
            **options,
        )

    return dict(
        adapted=make('adapted', adapted),
        merged=make('merged', merged),
        plain=make('plain', plain, exact=False),
    )


# --- evaluation and ONNX Runtime


def coco_evaluation(size: Size, names: Sequence[str]) -> dict:
    """COCO evaluation of synthetic detections, as many as of COCO val.

    5000 images, 7 boxes and 100 detections each, 80 classes.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from lors_plugin.evaluation import FasterCOCOeval

    dataset, detections = synthetic_coco(5 if size.quick else 5000)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        found = truth.loadRes(detections)

    def evaluate(kind):
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = kind(truth, found, 'bbox')
            evaluator.params.maxDets = [100, 300, 1000]
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return [torch.as_tensor(np.asarray(evaluator.stats))]

    return {
        name: Implementation(name, partial(evaluate, kind), trains=False)
        for name, kind in (
            ('pycocotools', COCOeval),
            ('faster-coco-eval', FasterCOCOeval),
        )
    }


def synthetic_coco(images: int) -> tuple[dict, list]:
    """Ground truth and detections, half of which are near a box."""
    rng = np.random.default_rng(0)

    def boxes(number):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (number, 2)))
        return np.concatenate([rng.uniform(0, 640 - sides), sides], axis=1)

    truth, detections = [], []
    for image in range(images):
        wanted, labels = boxes(7), rng.integers(0, 80, 7)
        for box, label in zip(wanted.tolist(), labels.tolist()):
            truth.append(
                dict(
                    id=len(truth) + 1,
                    image_id=image,
                    category_id=label,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
        found, kinds = boxes(100), rng.integers(0, 80, 100)
        near, source = rng.random(100) < 0.5, rng.integers(0, 7, 100)
        noise = 1 + rng.normal(0, 0.1, (100, 4))
        found = np.where(near[:, None], wanted[source] * noise, found)
        kinds = np.where(near, labels[source], kinds)
        scores = rng.random(100)
        for box, kind, score in zip(
            *(a.tolist() for a in (found, kinds, scores))
        ):
            detections.append(
                dict(image_id=image, category_id=kind, bbox=box, score=score)
            )
    dataset = dict(
        images=[dict(id=i, width=640, height=640) for i in range(images)],
        categories=[dict(id=i, name=str(i)) for i in range(80)],
        annotations=truth,
    )
    return dataset, detections


def classifier(backbone: dict, channels: int, hidden: bool = False) -> dict:
    """Config of a classifier of MMPretrain."""
    head = dict(type='LinearClsHead', num_classes=1000, in_channels=channels)
    if hidden:
        head.update(
            type='StackedLinearClsHead',
            mid_channels=[1280],
            act_cfg=dict(type='HSwish'),
        )
    return dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=head,
        data_preprocessor=dict(
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True,
        ),
    )


def ghost(arch: str, num_experts: int) -> dict:
    """Config of a ParameterNet; of a GhostNet with one expert."""
    backbone = dict(
        type='lors_plugin.ParameterNet', arch=arch, num_experts=num_experts
    )
    return classifier(backbone, {'600m': 1824, '300m': 1288}[arch], True)


CLASSIFIERS = {
    'MobileNetV2': classifier(dict(type='MobileNetV2'), 1280),
    'ParameterNet-600M': ghost('600m', 4),
    'ParameterNet-300M': ghost('300m', 4),
    'GhostNet-600M': ghost('600m', 1),
    'GhostNet-300M': ghost('300m', 1),
    'ResNet-50': classifier(dict(type='ResNet', depth=50), 2048),
    'Swin-T': classifier(
        # Padding is for --quick: at 224x224 there is nothing to pad.
        dict(type='SwinTransformer', arch='tiny', pad_small_map=True),
        768,
    ),
}


def onnx_latency(size: Size, names: Sequence[str]) -> dict:
    """Latency of exported classifiers in ONNX Runtime, one image of 224x224.

    Random weights, which do not change the time; one thread unless
    ``--threads`` says otherwise, as ParameterNet's paper measures it. Each
    file is compared with PyTorch when it is exported.
    """
    return {name: exported(name, size) for name in names}


def exported(name: str, size: Size) -> Implementation:
    """Export a model, check the file and open it in ONNX Runtime."""
    from lors_plugin.export import (
        ClassifierForExport,
        ExportError,
        check_file,
        export_file,
        for_export,
        new_session,
    )
    from lors_plugin.export.cases import classifier_case, random_images

    config = copy.deepcopy(CLASSIFIERS[name])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config)
    model.init_weights()
    model.eval()
    shape = (64, 64) if size.quick else (224, 224)

    def example(number):
        images = random_images(number, shape, number)
        return classifier_case(model, images, 'float', False)

    module = ClassifierForExport(for_export(model)).eval()
    try:
        content = export_file(module, example(2)[0])
        check_file(content, [example(1), example(3)], 1e-3)
    except ExportError as error:
        raise GateError(f'{name}: {error}') from error
    session = new_session(content, size.threads)
    (image,) = random_images(1, shape, 0)
    feed = {'images': image.unsqueeze(0).float().numpy()}
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return Implementation(
        name,
        lambda: [torch.from_numpy(out) for out in session.run(None, feed)],
        exact=False,
        trains=False,
        facts=dict(parameters=(millions, 'M')),
    )


OURS = ('reference', 'original', 'torch', 'cpu', 'triton', 'compiled')
CASES = dict(
    # ReLUs after norms have kinks: in float32 two right formulations differ.
    mixing=Case(mixing, (*OURS, 'recompute', 'products'), in_float64=True),
    sampling=Case(sampling, tuple(n for n in OURS if n != 'cpu')),
    # Points step from cell to cell: in float32, gradients of the first
    # stages differ by several per cent between two right formulations.
    decoder=Case(decoder, (*OURS, 'with_cp'), in_float64=True),
    # The loss also depends on which query is matched with which box.
    detector=Case(
        detector, OURS, tolerance=1e-2, gradient_tolerance=0.1, rate=True
    ),
    parameternet=Case(
        parameternet,
        ('reference', 'original', 'torch', 'converted', 'ghost'),
        models=('600m', '300m'),
        batch_sizes=(1, 32),
        queries=(None,),
        in_float64=True,
        rate=True,
    ),
    vit_adapters=Case(
        vit_adapters,
        ('adapted', 'merged', 'plain'),
        models=('vit-b',),
        batch_sizes=(1, 32),
        queries=(None,),
        baseline='plain',
        rate=True,
    ),
    coco_evaluation=Case(
        coco_evaluation,
        ('pycocotools', 'faster-coco-eval'),
        models=('coco-val',),
        batch_sizes=(None,),
        queries=(None,),
        modes=('forward',),
        baseline='pycocotools',
        tolerance=1e-6,
        memory=False,
    ),
    onnx_latency=Case(
        onnx_latency,
        tuple(CLASSIFIERS),
        models=('imagenet',),
        batch_sizes=(None,),
        queries=(None,),
        modes=('forward',),
        baseline='MobileNetV2',
        memory=False,
    ),
)
