"""Draw ground truth and predictions side by side, and one contact sheet.

Ground truth is yellow, dashed where no prediction found it. Predictions are
green when they meet a box of their class with an IoU of 0.5, else magenta.

Example:
    python tools/test.py CONFIG CHECKPOINT --out predictions.pkl
    python tools/analysis_tools/draw_predictions.py CONFIG \
        --pkl predictions.pkl --out-dir pictures
    python tools/analysis_tools/draw_predictions.py CONFIG --truth \
        --split train --out-dir pictures
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from drawing import (
    DrawError,
    Sample,
    best_threshold,
    contact_sheet,
    draw_pair,
    draw_truth,
    truth_sheet,
)

logger = logging.getLogger('draw_predictions')


def load_dataset(
    config: str,
    options: Mapping | None = None,
    split: str = 'test',
    trust: bool = False,
):
    """Build a data set of a config.

    Args:
        config (str): Path of the config.
        options (Mapping, optional): Changes to the config. Defaults to None.
        split (str): 'train', 'val' or 'test'. Defaults to 'test'.
        trust (bool): Allow files to run code of their own while they are
            read. Defaults to False.

    Returns:
        tuple: The config and the data set.
    """
    from lors_plugin.compat import install_mmcv_ext_fallback, read_safely

    install_mmcv_ext_fallback()
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(options or {}))
    read_safely(trust)
    return cfg, DATASETS.build(cfg[f'{split}_dataloader'].dataset)


def read_pickle(path: str, trust: bool = False) -> dict[str, Mapping]:
    """Read the predictions that ``tools/test.py --out`` wrote.

    Args:
        path (str): The pickle.
        trust (bool): Allow it to run code of its own while it is read.
            Defaults to False.

    Returns:
        dict[str, Mapping]: Image id, then its predicted ``bboxes``,
        ``scores`` and ``labels``.
    """
    from lors_plugin.checkpoints import load_pickle_file

    results = load_pickle_file(path, trust)
    try:
        found = {r['img_id']: r['pred_instances'] for r in results}
        good = all(_are_detections(item) for item in found.values())
    except (KeyError, TypeError):
        good = False
    if not good:
        raise DrawError(
            f'{path} does not hold detections of tools/test.py --out'
        )
    return found


def _are_detections(item: Mapping) -> bool:
    from torch import Tensor

    parts = [item[key] for key in ('bboxes', 'scores', 'labels')]
    if not all(isinstance(part, Tensor) for part in parts):
        return False
    boxes, scores, labels = (tuple(part.shape) for part in parts)
    return len(scores) == 1 and labels == scores and boxes == (*scores, 4)


def infer(
    cfg,
    checkpoint: str,
    infos: Sequence[Mapping],
    device: str,
    trust: bool = False,
) -> dict[str, Mapping]:
    """Run the detector.

    Args:
        cfg (Config): The config.
        checkpoint (str): Path of the weights.
        infos (Sequence[Mapping]): Images of the data set.
        device (str): Where to run.
        trust (bool): Allow the weights' file to run code of its own while it
            is read. Defaults to False.

    Returns:
        dict[str, Mapping]: See :func:`read_pickle`.
    """
    from mmdet.apis import inference_detector
    from trained_detector import load_detector

    model = load_detector(cfg, checkpoint, device, trust)
    return {
        info['img_id']: inference_detector(
            model, info['img_path']
        ).pred_instances
        for info in infos
    }


def make_sample(info: Mapping, prediction: Mapping | None) -> Sample:
    """Bring ground truth and predictions of an image together.

    Args:
        info (Mapping): Image of the data set.
        prediction (Mapping, optional): Predicted ``bboxes``, ``scores``,
            ``labels``.

    Returns:
        Sample: The image with its boxes.
    """
    truth = [i for i in info['instances'] if not i['ignore_flag']]
    sample = Sample(
        path=info['img_path'],
        gt_boxes=np.array([i['bbox'] for i in truth], float).reshape(-1, 4),
        gt_labels=np.array([i['bbox_label'] for i in truth], int),
    )
    if prediction is None:
        return sample
    scores = np.asarray(prediction['scores'].cpu(), np.float64)
    order = np.argsort(-scores, kind='stable')
    sample.boxes = np.asarray(prediction['bboxes'].cpu(), float)[order]
    sample.scores = scores[order]
    sample.labels = np.asarray(prediction['labels'].cpu(), int)[order]
    return sample


def collect_samples(args: argparse.Namespace) -> tuple[list[Sample], tuple]:
    """Get all images with ground truth and predictions.

    Args:
        args (argparse.Namespace): The options.

    Returns:
        tuple: The samples and the class names.
    """
    cfg, dataset = load_dataset(
        args.config, split=args.split, trust=args.trust
    )
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if not infos:
        raise DrawError(f'the {args.split} data set is empty')
    if args.truth:
        infos = spread(infos, args.num)
        predictions = dict.fromkeys(i['img_id'] for i in infos)
    elif args.pkl:
        predictions = read_pickle(args.pkl, args.trust)
    else:
        # Without a threshold all images are needed to choose one.
        if args.score_thr is not None:
            infos = spread(infos, args.num)
        predictions = infer(
            cfg, args.checkpoint, infos, args.device, args.trust
        )
    missing = [i for i in infos if i['img_id'] not in predictions]
    if missing:
        raise DrawError(
            f'{args.pkl} lacks {len(missing)} images of the test set of '
            f'{args.config}: it belongs to other data'
        )
    samples = [make_sample(i, predictions[i['img_id']]) for i in infos]
    return samples, dataset.metainfo['classes']


def spread(items: Sequence, number: int) -> list:
    """Choose items at even distances.

    Args:
        items (Sequence): What to choose from.
        number (int): How many; all when there are fewer.

    Returns:
        list: The choice, in the old order.
    """
    places = np.linspace(0, len(items) - 1, min(number, len(items)))
    return [items[i] for i in places.round().astype(int)]


def draw_pairs(
    samples: Sequence[Sample],
    classes: Sequence[str],
    args: argparse.Namespace,
) -> dict[str, np.ndarray]:
    """Draw ground truth and predictions side by side.

    Args:
        samples (Sequence[Sample]): All images with predictions.
        classes (Sequence[str]): Class names.
        args (argparse.Namespace): The options.

    Returns:
        dict[str, np.ndarray]: The pictures and their names.
    """
    score_thr = args.score_thr
    if score_thr is None:
        score_thr = best_threshold(samples)
        logger.info('score threshold with the best F1: %.2f', score_thr)
    samples = spread(samples, args.num)
    pictures = {
        Path(s.path).stem: draw_pair(s, classes, score_thr) for s in samples
    }
    pictures['contact_sheet'] = contact_sheet(samples, classes, score_thr)
    return pictures


def draw(args: argparse.Namespace) -> None:
    """Draw all pictures, as the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    samples, classes = collect_samples(args)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if args.truth:
        pictures = {Path(s.path).stem: draw_truth(s, classes) for s in samples}
        pictures['contact_sheet'] = truth_sheet(samples, classes)
    else:
        pictures = draw_pairs(samples, classes, args)
    for name, picture in pictures.items():
        path = out_dir / f'{name}.png'
        if not cv2.imwrite(str(path), picture):
            raise DrawError(f'cannot write {path}')
    logger.info('%d pictures: %s', len(pictures), out_dir)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Draw ground truth and predictions side by side'
    )
    parser.add_argument('config', help='config with a test_dataloader')
    parser.add_argument('checkpoint', nargs='?', help='weights')
    parser.add_argument(
        '--pkl', help='predictions of tools/test.py --out, saves inference'
    )
    parser.add_argument(
        '--truth',
        action='store_true',
        help='draw the ground truth alone, to check the data before a '
        'training',
    )
    parser.add_argument(
        '--split',
        choices=('train', 'val', 'test'),
        default='test',
        help='of which data set, with --truth (default: test)',
    )
    parser.add_argument('--out-dir', required=True, help='for the pictures')
    parser.add_argument(
        '--num', type=int, default=8, help='number of images (default: 8)'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        help='draw predictions from this score on (default: the threshold '
        'with the best F1)',
    )
    parser.add_argument('--device', default='cpu', help='(default: cpu)')
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow the checkpoint or pickle to run code of its own while it '
        'is read; only for files from people you trust',
    )
    args = parser.parse_args(argv)
    given = (args.checkpoint is not None, args.pkl is not None, args.truth)
    if sum(given) != 1:
        parser.error('give either a checkpoint or --pkl or --truth')
    if args.split != 'test' and not args.truth:
        parser.error('--split goes with --truth')
    if args.num < 1:
        parser.error('--num must be positive')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        draw(args)
    except (DrawError, ValueError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
