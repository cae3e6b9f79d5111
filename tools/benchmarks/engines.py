"""Time detectors and classifiers from files of images to results, by engine.

    python tools/benchmarks/engines.py --prepare     # at any time
    python tools/benchmarks/engines.py --minutes 18  # on a quiet machine
    python tools/benchmarks/engines.py --blocks detect parts --minutes 8
    python tools/benchmarks/engines.py --memory      # at any time

The plan is a list of blocks, the most important first (`--list` shows it).
Within a block all models and engines are timed in turns, in a new random
order each round: `network` from a batch of pixels to boxes or scores, `file`
from JPEG files to boxes in them, by the host's inferencer or by
lors_plugin.deploy.runtime. After each block the table is written; when the
minutes are over it stops, and the same command goes on where it stopped.
`--prepare` exports all files before, compares them with PyTorch, and refuses
those that differ. Weights are random, which changes no time but that of NMS;
so are INT8's scales. `memory` is the peak of a process that runs one image.
`parts` tells where the time of LORS-AdaMixer goes.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from harness import CLOCKS
from mmengine.logging import MMLogger
from results import Report, device_name, read_rows

from lors_plugin.adamixer import AdaMixer
from lors_plugin.build import (
    build_model,
    load_config,
    padded_shape,
    without_pretrained,
)
from lors_plugin.compat import read_safely
from lors_plugin.deploy import optimize
from lors_plugin.deploy.runtime import load
from lors_plugin.export import (
    ClassifierForExport,
    DetectorForExport,
    export_file,
    for_export,
    takes_one_size,
    write_file,
)
from lors_plugin.export.cases import (
    classifier_case,
    detector_case,
    random_images,
)
from lors_plugin.export.check import check
from lors_plugin.export.metadata import describe
from lors_plugin.export.onnx_file import onnx_model, with_metadata
from lors_plugin.export.smaller import quantize_convolutions
from lors_plugin.export.stock import stock_detector
from lors_plugin.reparam.compare import prepare
from lors_plugin.version import __version__

ROOT = Path(__file__).resolve().parents[2]
MODELS = dict(
    detect={
        'LORS-AdaMixer': 'lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
        'AdaMixer': 'adamixer/adamixer_r50_8xb2-1x_coco.py',
        'DINO-4scale': 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        'Deformable-DETR': 'mmdet::deformable_detr/'
        'deformable-detr_r50_16xb2-50e_coco.py',
        'DAB-DETR': 'mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py',
        'RetinaNet': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'FCOS': 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    },
    classify={
        'ParameterNet-600M': 'parameternet/parameternet-600m_8xb128_in1k.py',
        'GhostNet-600M': 'parameternet/ghostnet-600m_8xb128_in1k.py',
        'MobileNetV2': 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
        'MobileNetV3-L': 'mmpretrain::mobilenet_v3/'
        'mobilenet-v3-large_8xb128_in1k.py',
        'ResNet-50': 'mmpretrain::resnet/resnet50_8xb32_in1k.py',
        'Swin-T': 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
        'EfficientNet-B0': 'mmpretrain::efficientnet/'
        'efficientnet-b0_8xb32_in1k.py',
    },
)
PYTORCH = ('eager', 'eager-bf16', 'compiled', 'optimized')
# one: a file of one image of one size, the only kind for stock detectors.
FILES = tuple(
    engine + kind
    for kind in ('', '-one', '-int8')
    for engine in ('onnxruntime', 'openvino')
)
TOLERANCE = 1e-2  # random weights make much of rounding
SMALL = 256, 320  # to check and calibrate files of any size with


@dataclasses.dataclass
class Block:
    """A part of the table, whose models and engines are timed in turns.

    Attributes:
        name (str): Of the block.
        task (str): 'detect' or 'classify'.
        shape (tuple[int]): Height and width.
        engines (dict[str, tuple[str]]): Engines by model; ratios refer to
            the first of the first.
        number (int): Images per batch.
        threads (int): Of all engines.
        rounds (int): That count.
        warm (bool): Whether a round before them does not count.
        modes (tuple[str]): 'network', 'file' or both.
    """

    name: str
    task: str
    shape: tuple
    engines: dict
    number: int = 1
    threads: int = 1
    rounds: int = 3
    warm: bool = True
    modes: tuple = ('network',)

    @property
    def size(self):
        """Short text for the table."""
        height, width = self.shape
        threads = f'{self.threads} thread{"s" * (self.threads > 1)}'
        return f'{self.number} x {height} x {width}, {threads}'


def _plan():
    """Return all blocks, the most important first."""
    both = 'eager', 'onnxruntime', 'openvino'
    int8 = 'onnxruntime-int8', 'openvino-int8'
    ours = {'LORS-AdaMixer': (*both, *int8, 'optimized')}
    dense = dict.fromkeys(('FCOS', 'RetinaNet'), both)
    quick = {**ours, 'AdaMixer': both, **dense, 'DAB-DETR': both}
    slow = dict.fromkeys(('DINO-4scale', 'Deformable-DETR'), both)
    large, square = (800, 1333), (640, 640)
    files = 'onnxruntime', 'openvino'
    names = list(MODELS['classify'])
    nets = dict.fromkeys(names, both)
    nets['ParameterNet-600M'] += ('onnxruntime-one', 'openvino-one')
    small = {n: (*nets[n], *int8, 'optimized') for n in names[:5]}
    base = {'LORS-AdaMixer': ('eager',)}
    detect, classify = 'detect', 'classify'
    return [
        Block('detect', detect, large, quick, rounds=2),
        Block('classify', classify, (224, 224), nets, rounds=15),
        Block('parts', detect, large, ours),
        Block('slow', detect, large, {**base, **slow}, rounds=1, warm=False),
        Block('detect-2', detect, large, quick, threads=2, rounds=2),
        Block('square', detect, square, quick, rounds=3),
        Block(
            'file', detect, large, {'LORS-AdaMixer': both},
            rounds=2, modes=('network', 'file'),
        ),
        Block(
            'batch', detect, square, {'LORS-AdaMixer': both, 'AdaMixer': both},
            number=4, rounds=2,
        ),
        Block('classify-2', classify, (224, 224), nets, threads=2, rounds=15),
        Block(
            'batch-classify', classify, (224, 224),
            dict.fromkeys(names, files + ('eager',)), number=4, rounds=9,
        ),
        Block('int8', classify, (224, 224), small, rounds=15),
        Block(
            'compiled', detect, square,
            dict.fromkeys(('LORS-AdaMixer', 'FCOS'), ('eager', 'compiled')),
        ),
        Block(
            'compiled-classify', classify, (224, 224),
            dict.fromkeys(names, ('eager', 'compiled')), rounds=15,
        ),
        Block(
            'bfloat16', detect, square,
            {'LORS-AdaMixer': ('eager', 'eager-bf16')}, rounds=2,
        ),
    ]  # fmt: skip


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [block.name for block in _plan()]
    add('--blocks', nargs='+', choices=names, default=names, metavar='NAME')
    add('--list', action='store_true', help='show the plan')
    add('--minutes', type=float, default=float('inf'))
    add(
        '--prepare',
        action='store_true',
        help='export, check and compile; time nothing',
    )
    add('--memory', action='store_true', help='measure memory alone')
    add('--models', nargs='+', metavar='NAME', help='these models only')
    add('--engines', nargs='+', choices=(*PYTORCH, *FILES))
    add(
        '--shape',
        type=int,
        nargs=2,
        metavar='N',
        help='height and width instead of those of the plan, to try it',
    )
    add('--rounds', type=int, help='instead of those of the plan')
    add('--clock', choices=list(CLOCKS), default='wall')
    add('--output', type=Path, default=Path('work_dirs/engines'))
    add('--peak-of', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = [name for models in MODELS.values() for name in models]
    for name in args.models or ():
        if name not in known:
            parser.error(f'{name} is not one of {", ".join(known)}')
    return args


def blocks_of(args):
    """Return the blocks that are asked for, narrowed."""
    found = []
    for block in _plan():
        if block.name not in args.blocks:
            continue
        block.shape = tuple(args.shape or block.shape)
        block.rounds = args.rounds or block.rounds
        chosen = {
            name: [e for e in engines if e in (args.engines or engines)]
            for name, engines in block.engines.items()
            if name in (args.models or block.engines)
        }
        block.engines = {k: v for k, v in chosen.items() if v}
        if block.engines:
            found.append(block)
    return found


class Model:
    """A model of the host, and its files.

    Args:
        task (str): 'detect' or 'classify'.
        name (str): As in ``MODELS``.
        folder (Path): Where files of it are written, or were.
    """

    def __init__(self, task, name, folder):
        path = MODELS[task][name]
        path = path if '::' in path else str(ROOT / 'configs' / path)
        self.cfg = load_config(path)
        self.cfg.model = without_pretrained(self.cfg.model)
        self.name, self.path, self.folder = name, path, folder
        self.detects = task == 'detect'

    @functools.cached_property
    def torch(self):
        """The model in PyTorch, the same whenever it is built."""
        torch.manual_seed(0)
        model = build_model(self.cfg)
        model.init_weights()
        return model.eval()

    @property
    def is_stock_detector(self):
        return self.detects and not isinstance(self.torch, AdaMixer)

    def photos(self, number, shape):
        """Write images to files; return their paths."""
        paths = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(random_images(number, shape, 0)):
            photo = self.folder / f'{index}-{shape[0]}x{shape[1]}.jpg'
            cv2.imwrite(str(photo), image.permute(1, 2, 0).numpy())
            paths.append(str(photo))
        return paths

    def case(self, number, shape, one):
        """Inputs and outputs of so many images."""
        images = random_images(number, shape, 0)
        if not self.detects:
            return classifier_case(self.torch, images, 'uint8', False)
        if one:
            shape = padded_shape(self.torch, shape)
            return detector_case(self.torch, images, 'uint8', shape)
        return detector_case(self.torch, images, 'uint8')

    def inputs(self, number, shape):
        """Pixels of so many images, as a file takes them."""
        images = random_images(number, shape, 0)
        batch = torch.stack(images).flip(1).numpy()
        if not self.detects:
            return dict(images=batch)
        target = padded_shape(self.torch, shape)
        padded = np.zeros((number, 3, *target), np.uint8)
        padded[:, :, : shape[0], : shape[1]] = batch
        sizes = np.float32([shape[::-1]] * number)
        return dict(images=padded, sizes=sizes)

    def file(self, engine, shape):
        """Return the path of an ONNX file; export and check it once."""
        kind = engine.partition('-')[2]
        one = kind == 'one' or self.is_stock_detector
        fixed = one or takes_one_size(self.torch)
        suffix = f'-{shape[0]}x{shape[1]}' * fixed + '-one' * one
        path = self.folder / f'{self.name}{suffix}.onnx'
        if kind == 'int8':
            return self._quantized(path, shape if fixed else SMALL)
        if path.exists():
            return path
        number = 1 if one else None
        rewritten = for_export(self.torch, number)
        if self.is_stock_detector:
            module = stock_detector(rewritten, 'uint8')
        elif self.detects:
            module = DetectorForExport(rewritten, 'uint8')
        else:
            module = ClassifierForExport(rewritten, 'uint8')
        case = self.case(1, shape if fixed else SMALL, one)
        said = describe(self.cfg, module, self.path)
        said['pipeline'] = self.pipeline(shape)
        content = export_file(
            module.eval(),
            case[0],
            dynamic_batch=not one,
            dynamic_size=not fixed,
            metadata=said,
        )
        unchecked = path.with_suffix('.unchecked.onnx')
        write_file(content, unchecked)
        check(load(unchecked).engine, [case], TOLERANCE)
        unchecked.rename(path)
        return path

    def _quantized(self, path, shape):
        quantized = path.with_suffix('.int8.onnx')
        if not quantized.exists():
            path = self.file('onnxruntime', shape)
            model = onnx_model(path.read_bytes())
            said = {p.key: p.value for p in model.metadata_props}
            model = quantize_convolutions(model, iter([self.inputs(1, shape)]))
            write_file(with_metadata(model, said), quantized)
        return quantized

    def pipeline(self, shape):
        """Steps that leave images of a shape as they are."""
        if self.detects:
            scale = [max(shape), min(shape)]
            return [dict(type='Resize', scale=scale, keep_ratio=True)]
        return [dict(type='Resize', scale=list(shape[::-1]))]


class Run:
    """One model in one engine."""

    def __init__(self, label, **calls):
        self.label, self.calls = label, calls

    def time(self, modes, clock):
        """Seconds of each mode."""
        seconds = {}
        for mode in modes:
            start = CLOCKS[clock]()
            self.calls[mode]()
            seconds[mode] = CLOCKS[clock]() - start
        return seconds


def in_pytorch(model, engine, block):
    """Run a model in eager or compiled PyTorch."""
    network = model.torch
    if engine == 'compiled':
        # A model of its own: compiling changes it.
        network = Model(block.task, model.name, model.folder).torch
        network.extract_feat = torch.compile(network.extract_feat)
    if engine == 'optimized':
        network = optimize(network)
    kind = torch.bfloat16 if engine == 'eager-bf16' else None

    def predict(images):
        cast = torch.autocast('cpu', kind, enabled=kind is not None)
        with torch.no_grad(), cast:
            batch = prepare(network, images)
            if model.detects:
                return network.predict(
                    batch['inputs'], batch['data_samples'], rescale=False
                )
            return network(batch['inputs']).softmax(-1)

    from mmcv.transforms import Compose
    from mmengine.registry import DefaultScope

    steps = [dict(type='LoadImageFromFile'), *model.pipeline(block.shape)]
    steps[1]['scale'] = tuple(steps[1]['scale'])
    pack = 'PackDetInputs' if model.detects else 'PackInputs'
    meta = dict(meta_keys=('img_shape',)) if model.detects else {}
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
        pipeline = Compose([*steps, dict(type=pack, **meta)])
    photos = model.photos(block.number, block.shape)

    def from_files():
        return predict(
            [
                pipeline(dict(img_path=path, img_id=0))['inputs']
                for path in photos
            ]
        )

    images = random_images(block.number, block.shape, 0)
    return Run(
        f'{model.name} {engine}',
        network=lambda: predict(images),
        file=from_files,
    )


def in_engine(model, engine, block):
    """Run a file in ONNX Runtime or OpenVINO."""
    runner = load(
        model.file(engine, block.shape),
        engine=engine.partition('-')[0],
        threads=block.threads,
        batch_size=block.number,
    )
    inputs = model.inputs(block.number, block.shape)
    photos = model.photos(block.number, block.shape)
    return Run(
        f'{model.name} {engine}',
        network=lambda: runner.engine.run(inputs),
        file=lambda: runner(photos),
    )


def make_run(model, engine, block):
    """Make a run of any engine."""
    make = in_pytorch if engine in PYTORCH else in_engine
    return make(model, engine, block)


def time_until(runs, block, clock, deadline):
    """Time runs in turns; return seconds of whole rounds, by label and mode.

    A round is not begun that would end after the deadline.
    """
    shuffle, rounds, longest = random.Random(0).shuffle, [], 0.0
    order = list(runs)
    for number in range(block.rounds + block.warm):
        start = time.monotonic()
        if start + longest > deadline:
            break
        shuffle(order)
        found = {}
        for run in order:
            if time.monotonic() > deadline:
                return rounds
            found[run.label] = run.time(block.modes, clock)
        longest = time.monotonic() - start
        if number or not block.warm:
            rounds.append(found)
    return rounds


PARTS = {
    'backbone': r'backbone',
    'neck': r'neck',
    'generator': r'mixing\b.*\bgenerator',
    'out_proj': r'mixing\b.*\bout_proj',
    'mixing': r'mixing',
    'sampling': r'sampling',
    'attention': r'attention',
    'ffn': r'ffn',
}


def parts_in_pytorch(model, block, rounds):
    """Return seconds of the parts of a detector in eager PyTorch."""
    network, marks, hooks = model.torch, [], []

    def begin(name, *_):
        marks.append([name, time.perf_counter(), 0.0])

    def end(name, *_):
        _, start, inner = marks.pop()
        whole = time.perf_counter() - start
        spent[name] += whole - inner
        if marks:
            marks[-1][2] += whole

    for name, module in network.named_modules():
        for part, pattern in PARTS.items():
            if re.fullmatch(rf'(.*\.)?({pattern})', name):
                hooks += [
                    module.register_forward_pre_hook(
                        functools.partial(begin, part)
                    ),
                    module.register_forward_hook(functools.partial(end, part)),
                ]
                break
    run, found = in_pytorch(model, 'eager', block), []
    for _ in range(rounds + 1):
        spent = collections.Counter()
        start = time.perf_counter()
        run.calls['network']()
        spent['rest'] = time.perf_counter() - start - sum(spent.values())
        found.append(spent)
    for hook in hooks:
        hook.remove()
    return found[1:]


def parts_in_onnxruntime(model, block, rounds):
    """Return seconds of the parts of a detector in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = block.threads
    options.enable_profiling = True
    options.profile_file_prefix = str(model.folder / 'profile')
    session = onnxruntime.InferenceSession(
        str(model.file('onnxruntime', block.shape)),
        options,
        providers=['CPUExecutionProvider'],
    )
    inputs = model.inputs(block.number, block.shape)
    for _ in range(rounds + 1):
        session.run(None, inputs)
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    starts = sorted(e['ts'] for e in events if e['name'] == 'model_run')
    found = [collections.Counter() for _ in starts]
    for event in events:
        if not event['name'].endswith('_kernel_time'):
            continue
        index = sum(start <= event['ts'] for start in starts) - 1
        name = event['name'].replace('/', '.')
        part = next(
            (p for p, r in PARTS.items() if re.search(rf'\.({r})\.', name)),
            'rest',
        )
        found[index][part] += event['dur'] / 1e6
    return found[1:]


def measure_parts(model, block, report):
    """Report where the time goes."""
    for engine, measure in (
        ('eager', parts_in_pytorch),
        ('onnxruntime', parts_in_onnxruntime),
    ):
        found = measure(model, block, block.rounds)
        rows = [
            (f'{model.name} {engine} {part}', 'float32', 'network', 'time',
             'ms', [1000 * spent[part] for spent in found], None)
            for part in (*PARTS, 'rest')
        ]  # fmt: skip
        report.add(block.name, block.size, _config(block), '', rows)


ALONE = """
import re, sys
from pathlib import Path
from lors_plugin.deploy import optimize
from lors_plugin.deploy.runtime import load

path, engine, photo = sys.argv[1:]
load(path, engine=engine, threads=1)([photo])
status = Path('/proc/self/status').read_text()
print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024)
"""


def peak_memory(model, engine, block, args):
    """Megabytes of a process that runs one image through one engine.

    PyTorch is part of it only where it runs the model.
    """
    if engine in PYTORCH:
        command = [
            *(__file__, '--blocks', block.name, '--models', model.name),
            *('--shape', *map(str, block.shape)),
            *('--output', str(args.output)),
            *('--peak-of', model.name, engine),
        ]
    else:
        path = str(model.file(engine, block.shape))
        photo = model.photos(1, block.shape)[0]
        command = ['-c', ALONE, path, engine.partition('-')[0], photo]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _config(block):
    """Return the fields that identify a block in the table."""
    return dict(
        block=block.name,
        batch=block.number,
        shape=block.shape,
        threads=block.threads,
    )


def new_report(args):
    """Return a report with the rows that are there, and what is done."""
    report = Report(
        dict(
            device='cpu',
            device_name=device_name(torch.device('cpu')),
            torch=torch.__version__,
            triton='',
            lors_plugin=__version__,
        )
    )
    path = args.output / 'benchmarks.csv'
    if path.exists():
        report.rows = read_rows(path)
    done = {(row['config'], row['metric']) for row in report.rows}
    return report, done


def main(argv=None):
    """Time everything; 1 if an exported file computes something else."""
    args = parse_args(argv)
    start = time.monotonic()
    warnings.filterwarnings('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    read_safely()
    args.output.mkdir(parents=True, exist_ok=True)
    compiled = (args.output / 'compiled').absolute()
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(compiled))
    blocks, models = blocks_of(args), {}

    def get(block, name):
        key = block.task, name
        if key not in models:
            models[key] = Model(*key, args.output / 'models')
        return models[key]

    if args.peak_of:
        name, engine = args.peak_of
        torch.set_num_threads(1)
        run = make_run(get(blocks[0], name), engine, blocks[0])
        run.calls['network']()
        # Of `getrusage`, a child inherits its parent's.
        status = Path('/proc/self/status').read_text()
        print(int(re.search(r'VmHWM:\s+(\d+)', status)[1]) / 1024)
        return 0
    if args.list:
        for block in blocks:
            print(f'{block.name}: {block.size}, {block.rounds} rounds')
            for name, engines in block.engines.items():
                print(f'    {name}: {", ".join(engines)}')
        return 0
    report, done = new_report(args)
    deadline, failed = start + 60 * args.minutes, set()
    for block in blocks:
        metric = 'memory' if args.memory else 'time'
        key = json.dumps(_config(block), sort_keys=True), metric
        if key in done and not args.prepare:
            continue
        if time.monotonic() > deadline:
            break
        torch.set_num_threads(block.threads)
        report.machine['threads'] = block.threads
        runs = {}
        for name, engines in block.engines.items():
            for engine in engines:
                try:
                    runs[name, engine] = make_run(
                        get(block, name), engine, block
                    )
                    if args.prepare and engine == 'compiled':
                        runs[name, engine].calls['network']()
                except RuntimeError as error:
                    failed.add(f'{name} {engine}: {error}')
            if args.prepare:
                runs.clear()
        if args.prepare:
            continue
        if args.memory:
            rows = [
                (run.label, 'float32', 'network', 'memory', 'MB',
                 [peak_memory(get(block, name), engine, block, args)], None)
                for (name, engine), run in runs.items()
            ]  # fmt: skip
        elif block.name == 'parts':
            for name in block.engines:
                measure_parts(get(block, name), block, report)
            report.write_rows(args.output)
            continue
        else:
            rounds = time_until(
                list(runs.values()), block, args.clock, deadline
            )
            if not rounds:
                break
            rows = [
                (run.label, 'float32', mode, 'time', 'ms',
                 [1000 * found[run.label][mode] for found in rounds], None)
                for run in runs.values()
                for mode in block.modes
            ]  # fmt: skip
        first = next(iter(runs.values())).label
        report.add(block.name, block.size, _config(block), first, rows)
        report.write_rows(args.output)
    for line in sorted(failed):
        sys.stderr.write(f'error: {line}\n')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
