"""Trainings of the ParameterNet evidence: data, recipe, one run."""

import gzip
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from lors_plugin.analysis import ExpertUsage, collapsed_layers
from lors_plugin.registry import MODELS

logger = logging.getLogger('evidence')


class EvidenceError(RuntimeError):
    """The tool cannot go on; the message says why."""


class Part(NamedTuple):
    """Images of a data set, in memory.

    Attributes:
        images (Tensor): Grey, shape (N, 1, H, W), mean 0 and deviation 1 on
            the training images.
        labels (Tensor): Shape (N,).
    """

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A data set.

    Attributes:
        train (Part): Images to train on.
        test (Part): Images to test on.
        vertical (bool): Whether images may be flipped upside down too.
    """

    train: Part
    test: Part
    vertical: bool

    @property
    def classes(self) -> int:
        """int: How many there are."""
        return int(self.train.labels.max()) + 1


@dataclass
class Recipe:
    """What all runs have in common.

    Attributes:
        large_epochs (int): Of the large set.
        small_epochs (int): Of the small set, from scratch or pretrained.
        large_images (int): Images of the large set to train on, 0 for all.
        size (int): Side of the small set's images.
        large_batch (int): Images of the large set in a step.
        small_batch (int): Images of the small set in a step.
        lr (float): AdamW's highest learning rate, also after pretraining, so
            that nothing but the start differs.
        weight_decay (float): AdamW's.
        warmup (float): Share of the steps before the cosine.
    """

    large_epochs: int = 1
    small_epochs: int = 12
    large_images: int = 40000
    size: int = 32
    large_batch: int = 64
    small_batch: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.1


def load_fashion_mnist(root: Path, number: int = 0) -> Data:
    """Read Fashion-MNIST.

    Args:
        root (Path): Folder of the four files, packed or not.
        number (int): Training images to take, 0 for all. Defaults to 0.

    Returns:
        Data: Images of 28 x 28 pixels, ten classes.
    """
    arrays = [
        _read_idx(root, f'{part}-{kind}-ubyte')
        for part in ('train', 't10k')
        for kind in ('images-idx3', 'labels-idx1')
    ]
    if number:
        arrays[:2] = [array[:number] for array in arrays[:2]]
    return _normalised(*arrays, vertical=False)


def _read_idx(root: Path, name: str) -> np.ndarray:
    packed, plain = root / f'{name}.gz', root / name
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise EvidenceError(f'neither {plain} nor {packed} exists')
    dims = content[3]
    shape = np.frombuffer(content, '>i4', dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_lists(root: Path, train: str, test: str, size: int) -> Data:
    """Read images that lists name, as ``mmpretrain.CustomDataset`` does.

    Args:
        root (Path): What tools/dataset_converters/elpv.py made: images in
            ``images``, lists in ``annotations``.
        train (str): List with a file and a label in each line.
        test (str): The same, of test images.
        size (int): Side that images are resized to.

    Returns:
        Data: Grey images.
    """
    arrays = []
    for name in (train, test):
        path = root / 'annotations' / name
        if not path.is_file():
            raise EvidenceError(f'{path} does not exist')
        rows = [line.split() for line in path.read_text().splitlines()]
        images = [
            mmcv.imresize(
                mmcv.imread(str(root / 'images' / file), 'grayscale'),
                (size, size),
                interpolation='area',
            )
            for file, _ in rows
        ]
        arrays += [np.stack(images), np.array([int(row[1]) for row in rows])]
    return _normalised(*arrays, vertical=True)


def _normalised(train_x, train_y, test_x, test_y, vertical) -> Data:
    mean, std = train_x.mean(), train_x.std()
    parts = [
        Part(
            torch.from_numpy((x[:, None] - mean) / std).float(),
            torch.from_numpy(y.astype(np.int64)),
        )
        for x, y in ((train_x, train_y), (test_x, test_y))
    ]
    return Data(*parts, vertical)


def build(config: ConfigDict, options: dict, classes: int) -> nn.Module:
    """Build a classifier.

    Args:
        config (ConfigDict): Model of a config.
        options (dict): Of the backbone, to override.
        classes (int): How many there are.

    Returns:
        nn.Module: The classifier, initialised as its layers are.
    """
    config = ConfigDict(config)
    config.backbone = {**config.backbone, **options}
    config.head = {**config.head, 'num_classes': classes}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(config)


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    batch: int,
    recipe: Recipe,
    seed: int,
) -> float:
    """Train a classifier.

    Args:
        model (nn.Module): The classifier.
        data (Data): What it learns.
        epochs (int): How often it sees an image.
        batch (int): Images a step.
        recipe (Recipe): The rest.
        seed (int): Of order and flips.

    Returns:
        float: Mean loss of the last tenth of the steps.
    """
    images, labels = data.train
    samples = [DataSample().set_gt_label(label) for label in labels.tolist()]
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.lr, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _warm_cosine(steps, recipe.warmup)
    )
    random = torch.Generator().manual_seed(seed)
    model.train()
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=random)
        for chosen in order.split(batch):
            if len(chosen) < batch:
                continue
            x = _flipped(images[chosen], data.vertical, random)
            loss = model.loss(x, [samples[i] for i in chosen])['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _warm_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    first = max(1, int(warmup * steps))

    def factor(step):
        if step < first:
            return (step + 1) / first
        return 0.5 + 0.5 * math.cos(math.pi * (step - first) / (steps - first))

    return factor


def _flipped(x: Tensor, vertical: bool, random: torch.Generator) -> Tensor:
    for dim in (2, 3) if vertical else (3,):
        chosen = torch.rand(len(x), 1, 1, 1, generator=random) < 0.5
        x = torch.where(chosen, x.flip(dim), x)
    return x


@torch.no_grad()
def test(model: nn.Module, part: Part) -> dict:
    """Test a classifier.

    Args:
        model (nn.Module): The classifier.
        part (Part): Images to test on.

    Returns:
        dict: ``accuracy`` and, of two classes, ``auc``, the area under the
        ROC curve, in percent; ``experts``, means over dynamic layers.
    """
    model.eval()
    with ExpertUsage(model) as usage:
        scores = torch.cat(
            [model(x, mode='tensor') for x in part.images.split(256)]
        )
    right = (scores.argmax(1) == part.labels).double()
    result = dict(accuracy=100 * right.mean().item())
    if scores.shape[1] == 2:
        result['auc'] = 100 * area_under_curve(
            scores[:, 1] - scores[:, 0], part.labels
        )
    layers = usage.result()
    if layers:
        result['experts'] = dict(
            collapsed=len(collapsed_layers(layers)),
            **{
                name: sum(getattr(x, name) for x in layers.values())
                / len(layers)
                for name in ('top', 'entropy', 'variation')
            },
        )
    return result


# Not a test, whatever its name makes of it.
test.__test__ = False


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Chance that a positive image scores higher than a negative one.

    Args:
        scores (Tensor): Shape (N,).
        labels (Tensor): 0 or 1, shape (N,).

    Returns:
        float: From 0 to 1; ties count half.
    """
    positive, negative = scores[labels == 1], scores[labels == 0]
    difference = positive[:, None] - negative[None]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


@dataclass
class Run:
    """A model with a seed: large set, small set without and with it.

    Attributes:
        model (str): Name of the model.
        options (dict): Of its backbone.
        seed (int): Of weights, order and flips.
        path (Path): File of the results.
    """

    model: str
    options: dict
    seed: int
    path: Path

    def results(self, recipe: Recipe) -> dict | None:
        """Read what was found, if the run is finished.

        Args:
            recipe (Recipe): What it would be trained by.

        Returns:
            dict, optional: The results.
        """
        if not self.path.is_file():
            return None
        content = json.loads(self.path.read_text())
        if content['recipe'] != asdict(recipe):
            raise EvidenceError(
                f'{self.path} was made by another recipe '
                f'({content["recipe"]} instead of {asdict(recipe)}): choose '
                'another --work-dir or delete it'
            )
        return content

    def train(
        self, config: ConfigDict, large: Data, small: Data, recipe: Recipe
    ) -> None:
        """Train three times, test, and write the results.

        Args:
            config (ConfigDict): Model of the config.
            large (Data): To pretrain on.
            small (Data): To compare on.
            recipe (Recipe): What all runs have in common.
        """
        begin = time.process_time()
        phases = {}
        weights = None
        large = large, recipe.large_epochs, recipe.large_batch
        small = small, recipe.small_epochs, recipe.small_batch
        for name, (data, epochs, batch) in (
            ('large', large),
            ('scratch', small),
            ('pretrained', small),
        ):
            torch.manual_seed(self.seed)
            model = build(config, self.options, data.classes)
            if name == 'pretrained':
                model.load_state_dict(weights, strict=False)
            loss = train(model, data, epochs, batch, recipe, self.seed)
            phases[name] = dict(loss=loss, **test(model, data.test))
            if name == 'large':
                weights = {
                    key: value
                    for key, value in model.state_dict().items()
                    if not key.startswith('head.layers.1.')
                }
            logger.info(
                '%s, seed %d, %s: %.2f %%, loss %.3f, %.0f s so far',
                self.model,
                self.seed,
                name,
                phases[name]['accuracy'],
                loss,
                time.process_time() - begin,
            )
        content = dict(
            model=self.model,
            seed=self.seed,
            recipe=asdict(recipe),
            seconds=time.process_time() - begin,
            **phases,
        )
        self.path.write_text(json.dumps(content, indent=1) + '\n')
