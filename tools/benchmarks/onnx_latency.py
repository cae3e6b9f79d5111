"""Latency in ONNX Runtime on one thread, as ParameterNet's paper measures it.

    python tools/benchmarks/onnx_latency.py --out-dir OUT [--page PAGE.md]

Exports ParameterNet, GhostNet and stock classifiers of MMPretrain with random
weights (they do not change the time), checks each file against PyTorch, and
runs all in turns, in a new random order each round, so that a machine that
slows down slows all of them down. Writes onnx_latency.csv and, between the
marks of a page, the table. Numbers of files of different machines do not
compare; ratios do, roughly.
"""

import argparse
import csv
import logging
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable

BASE = 'MobileNetV2'
BEGIN, END = '<!-- onnx_latency -->', '<!-- onnx_latency: end -->'
CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)
PREPROCESSOR = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
)


def ghost(arch, num_experts):
    """Model config of a ParameterNet, or of a GhostNet by one expert."""
    channels = {'600m': 1824, '300m': 1288}[arch]
    return dict(
        backbone=dict(
            type='lors_plugin.ParameterNet',
            arch=arch,
            num_experts=num_experts,
        ),
        head=dict(
            type='StackedLinearClsHead',
            num_classes=1000,
            in_channels=channels,
            mid_channels=[1280],
            act_cfg=dict(type='HSwish'),
        ),
    )


def stock(in_channels, **backbone):
    """Model config of a backbone of MMPretrain."""
    head = dict(type='LinearClsHead', num_classes=1000)
    return dict(backbone=backbone, head=dict(head, in_channels=in_channels))


MODELS = {
    'ParameterNet-600M': ghost('600m', 4),
    'ParameterNet-300M': ghost('300m', 4),
    'GhostNet-600M': ghost('600m', 1),
    'GhostNet-300M': ghost('300m', 1),
    'MobileNetV2': stock(1280, type='MobileNetV2'),
    'ResNet-50': stock(2048, type='ResNet', depth=50),
    'Swin-T': stock(768, type='SwinTransformer', arch='tiny'),
}


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--models', nargs='+', choices=list(MODELS), default=list(MODELS))
    add('--shape', type=int, default=224, help='(default: %(default)s)')
    add('--threads', type=int, default=1, help='(default: %(default)s)')
    add(
        '--clock',
        choices=list(CLOCKS),
        default='wall',
        help='cpu counts the time that the process had a processor, for '
        'machines that others use too, with one thread (default: %(default)s)',
    )
    add('--rounds', type=int, default=50, help='(default: %(default)s)')
    add(
        '--out-dir',
        type=Path,
        default=Path('work_dirs/onnx_latency'),
        help='folder of the CSV file (default: %(default)s)',
    )
    add(
        '--keep',
        type=Path,
        metavar='FOLDER',
        help='keep the exported files there, and take those that are there',
    )
    add(
        '--page',
        type=Path,
        help=f'a Markdown file to write the table into, between {BEGIN} and '
        f'{END}',
    )
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1 or args.shape < 32:
        parser.error('--rounds and --threads are at least 1, --shape 32')
    if args.clock == 'cpu' and args.threads > 1:
        parser.error('--clock cpu adds up threads; use one')
    return args


def exported(name, args):
    """The file of one model, checked.

    Returns:
        tuple: The file's content and its error.
    """
    from mmengine.registry import DefaultScope

    from lors_plugin.export import (
        ClassifierForExport,
        check_file,
        export_file,
        for_export,
    )
    from lors_plugin.export.cases import classifier_case, random_images
    from lors_plugin.registry import MODELS as REGISTRY

    config = dict(
        type='ImageClassifier',
        neck=dict(type='GlobalAveragePooling'),
        data_preprocessor=PREPROCESSOR,
        **MODELS[name],
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = REGISTRY.build(config)
    model.init_weights()
    model.eval()
    module = ClassifierForExport(for_export(model)).eval()
    shape = args.shape, args.shape

    def case(number):
        images = random_images(number, shape, number)
        return classifier_case(model, images, 'float', False)

    content = export_file(
        module,
        case(2)[0],
        metadata=dict(parameters=sum(p.numel() for p in model.parameters())),
    )
    return content, check_file(content, [case(1), case(3)], 1e-3)


def prepare(name, args):
    """A session of one model and the parameters that it has in PyTorch."""
    from lors_plugin.export import new_session, write_file

    path = args.keep and args.keep / f'{name}-{args.shape}.onnx'
    if path and path.is_file():
        content, text = path.read_bytes(), 'there already'
    else:
        content, error = exported(name, args)
        text = f'error {error:.1e}'
        if path:
            write_file(content, path)
    print(f'{name}: {text}', flush=True)
    session = new_session(content, args.threads)
    said = session.get_modelmeta().custom_metadata_map
    return session, int(said['parameters'])


def measure(ready, args):
    """Milliseconds of each model in each round but the first."""
    from lors_plugin.export.cases import random_images

    images = random_images(1, (args.shape, args.shape), 0)
    feed = {'images': images[0].unsqueeze(0).float().numpy()}
    names, milliseconds = list(ready), {name: [] for name in ready}
    shuffle, clock = random.Random(0).shuffle, CLOCKS[args.clock]
    for number in range(args.rounds + 1):
        shuffle(names)
        for name in names:
            start = clock()
            ready[name][0].run(None, feed)
            if number:
                spent = clock() - start
                milliseconds[name].append(1000 * spent)
    return milliseconds


def table(rows):
    """Rows as Markdown."""
    head = '| | parameters | median, ms | fastest, ms | to MobileNetV2 |'
    lines = [head, '|---|---|---|---|---|']
    for row in rows:
        lines.append(
            f'| {row["model"]} | {int(row["parameters"]) / 1e6:.2f} M | '
            f'{row["median_ms"]} | {row["fastest_ms"]} | '
            f'{row["ratio"] or "-"} |'
        )
    return '\n'.join(lines)


def write_page(path, text):
    """Put the table between the marks of a page."""
    page = path.read_text(encoding='utf-8')
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'{path} has no marks {BEGIN} and {END}')
    path.write_text(
        f'{before}{BEGIN}\n\n{text}\n\n{END}{after}', encoding='utf-8'
    )


def run(args):
    """Export, check, measure, write."""
    ready = {name: prepare(name, args) for name in args.models}
    milliseconds = measure(ready, args)
    fastest = {name: min(found) for name, found in milliseconds.items()}
    rows = []
    for name, found in milliseconds.items():
        ratio = fastest[name] / fastest[BASE] if BASE in fastest else None
        rows.append(
            dict(
                model=name,
                parameters=ready[name][1],
                shape=args.shape,
                threads=args.threads,
                clock=args.clock,
                rounds=args.rounds,
                median_ms=f'{statistics.median(found):.1f}',
                fastest_ms=f'{fastest[name]:.1f}',
                # Of the fastest: others on the machine only ever slow down.
                ratio=ratio and f'{ratio:.2f}',
            )
        )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / 'onnx_latency.csv'
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(f'wrote {path}')
    if args.page:
        write_page(args.page, table(rows))
        print(f'wrote {args.page}')


def main(argv=None):
    """Measure; exit code 1 if a file is wrong, 2 for a mistake."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    from lors_plugin.export import ExportError

    try:
        run(args)
    except ExportError as error:
        sys.stderr.write(f'error: {error}\n')
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f'error: {error}\n')
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
