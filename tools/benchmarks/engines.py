"""Time detectors and classifiers from files of images to results, by engine.

    python tools/benchmarks/engines.py --threads 1 --repeats 9
    python tools/benchmarks/engines.py --task classify --threads 1
    python tools/benchmarks/engines.py --models LORS-AdaMixer FCOS \\
        --engines eager openvino --shape 640 640 --batch-sizes 1 4

All models and engines are timed in turns, in a new random order each round:
`network` from a batch of pixels to boxes or scores, `file` from JPEG files to
boxes in them, by the host's inferencer or by lors_plugin.deploy.runtime. An
exported file is compared with PyTorch first, and not timed if it differs.
Weights are random, which changes no time but that of NMS; so are INT8's
scales. Detectors of MMDetection run in PyTorch only: they are not exported.
`memory` is the peak of a process that runs one image through one engine.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import cv2
import torch
from harness import CLOCKS, time_in_turns
from mmengine.logging import MMLogger
from results import Report, device_name

from lors_plugin.build import (
    build_model,
    is_detector,
    load_config,
    without_pretrained,
)
from lors_plugin.compat import read_safely
from lors_plugin.deploy.runtime import load
from lors_plugin.export import (
    ClassifierForExport,
    DetectorForExport,
    export_file,
    for_export,
    write_file,
)
from lors_plugin.export.cases import (
    classifier_case,
    detector_case,
    random_images,
)
from lors_plugin.export.check import largest_error
from lors_plugin.export.metadata import describe
from lors_plugin.export.onnx_file import onnx_model, with_metadata
from lors_plugin.export.smaller import quantize_convolutions
from lors_plugin.reparam.compare import prepare
from lors_plugin.version import __version__

ROOT = Path(__file__).resolve().parents[2]
# The first of a task is what ratios refer to.
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
ENGINES = (
    'eager',
    'eager-bf16',
    'compiled',
    'onnxruntime',
    'openvino',
    'onnxruntime-int8',
    'openvino-int8',
)
TOLERANCE = 1e-2  # random weights make much of rounding


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--task', choices=list(MODELS), default='detect')
    names = [name for models in MODELS.values() for name in models]
    add('--models', nargs='+', choices=names, help='(default: all of a task)')
    add('--engines', nargs='+', choices=ENGINES, default=list(ENGINES))
    add(
        '--modes',
        nargs='+',
        choices=('network', 'file'),
        default=['network', 'file'],
    )
    add(
        '--shape',
        type=int,
        nargs=2,
        metavar='N',
        help='height and width (default: 800 1333, or 224 224)',
    )
    add('--batch-sizes', type=int, nargs='+', default=[1])
    add('--threads', type=int, default=1)
    add('--repeats', type=int, default=9)
    add('--clock', choices=list(CLOCKS), default='wall')
    add('--memory', action='store_true', help='measure memory too')
    add('--output', type=Path, default=Path('work_dirs/engines'))
    add('--peak-of', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.models = args.models or list(MODELS[args.task])
    if wrong := set(args.models) - set(MODELS[args.task]):
        parser.error(f'--task {args.task} has no {wrong.pop()}')
    default = (800, 1333) if args.task == 'detect' else (224, 224)
    args.shape = tuple(args.shape or default)
    return args


class Model:
    """A model of the host, and its files.

    Args:
        name (str): As in ``MODELS``.
        args (argparse.Namespace): Of the command line.
        folder (Path): Where files of it are written.
    """

    def __init__(self, name, args, folder):
        path = MODELS[args.task][name]
        path = path if '::' in path else str(ROOT / 'configs' / path)
        self.cfg = load_config(path)
        self.cfg.model = without_pretrained(self.cfg.model)
        self.name, self.path, self.folder = name, path, folder
        self.shape, self.threads = args.shape, args.threads
        self.torch = build_model(self.cfg)
        self.torch.init_weights()
        self.torch.eval()
        self.detects = is_detector(self.torch)
        self.images = random_images(max(args.batch_sizes), self.shape, 0)
        self.photos = []
        for index, image in enumerate(self.images):
            photo = folder / f'{index}.jpg'
            cv2.imwrite(str(photo), image.permute(1, 2, 0).numpy())
            self.photos.append(str(photo))
        self.exported = None

    @property
    def exports(self):
        """Return whether ``tools/export.py`` takes the model."""
        return not self.detects or hasattr(self.torch, 'query_generator')

    def case(self, number):
        """Inputs and outputs of so many images."""
        if self.detects:
            return detector_case(self.torch, self.images[:number], 'uint8')
        images = self.images[:number]
        return classifier_case(self.torch, images, 'uint8', False)

    def onnx(self, int8):
        """Return the path of an ONNX file; export it once."""
        path = self.folder / f'{self.name}.onnx'
        if not path.exists():
            kind = DetectorForExport if self.detects else ClassifierForExport
            module = kind(for_export(self.torch), 'uint8').eval()
            said = describe(self.cfg, module, self.path)
            said['pipeline'] = self.pipeline()
            size = not any('Swin' in part for part in (self.name,))
            content = export_file(
                module, self.case(1)[0], dynamic_size=size, metadata=said
            )
            write_file(content, path)
        if not int8:
            return path
        quantized = path.with_suffix('.int8.onnx')
        if not quantized.exists():
            model = onnx_model(path.read_bytes())
            said = {p.key: p.value for p in model.metadata_props}
            batches = load(path).inputs(self.photos[:1])
            model = quantize_convolutions(model, (b for b, _ in batches))
            write_file(with_metadata(model, said), quantized)
        return quantized

    def pipeline(self):
        """Steps that give the shape that was asked for."""
        height, width = self.shape
        if self.detects:
            scale = [max(self.shape), min(self.shape)]
            return [dict(type='Resize', scale=scale, keep_ratio=True)]
        return [dict(type='Resize', scale=[width, height])]


class Run:
    """One model in one engine; ``time`` as :func:`time_in_turns` asks."""

    def __init__(self, label, error, **calls):
        self.label, self.error, self.calls = label, error, calls

    def time(self, modes, clock):
        """Seconds of each mode."""
        seconds = {}
        for mode in modes:
            start = CLOCKS[clock]()
            self.calls[mode]()
            seconds[mode] = CLOCKS[clock]() - start
        return seconds


def in_pytorch(model, engine, number):
    """Run a model in eager or compiled PyTorch."""
    network = model.torch
    if engine == 'compiled':
        network.extract_feat = torch.compile(network.extract_feat)
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

    steps = [dict(type='LoadImageFromFile'), *model.pipeline()]
    steps[1]['scale'] = tuple(steps[1]['scale'])
    pack = 'PackDetInputs' if model.detects else 'PackInputs'
    meta = dict(meta_keys=('img_shape',)) if model.detects else {}
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
        pipeline = Compose([*steps, dict(type=pack, **meta)])

    def from_files():
        return predict(
            [
                pipeline(dict(img_path=path, img_id=0))['inputs']
                for path in model.photos[:number]
            ]
        )

    images = model.images[:number]
    return Run(
        f'{model.name} {engine}',
        None,
        network=lambda: predict(images),
        file=from_files,
    )


def in_engine(model, engine, number):
    """Run a file in ONNX Runtime or OpenVINO."""
    engine_name, _, int8 = engine.partition('-')
    path = model.onnx(bool(int8))
    runner = load(
        path, engine=engine_name, threads=model.threads, batch_size=number
    )
    error = largest_error(runner.engine, [model.case(number)])
    if not int8 and not error <= TOLERANCE:
        raise RuntimeError(f'{model.name} {engine}: wrong by {error:.1e}')
    names = runner.engine.shapes
    inputs = dict(zip(names, (t.numpy() for t in model.case(number)[0])))
    return Run(
        f'{model.name} {engine}',
        error,
        network=lambda: runner.engine.run(inputs),
        file=lambda: runner(model.photos[:number]),
    )


def make_run(model, engine, number):
    """Make a run of any engine."""
    if engine in ('eager', 'eager-bf16', 'compiled'):
        return in_pytorch(model, engine, number)
    return in_engine(model, engine, number)


ALONE = """
import re, sys
from pathlib import Path
from lors_plugin.deploy.runtime import load

path, engine, threads, photo = sys.argv[1:]
load(path, engine=engine, threads=int(threads))([photo])
status = Path('/proc/self/status').read_text()
print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024)
"""


def peak_memory(model, engine, args):
    """Megabytes of a process that runs one image through one engine.

    PyTorch is part of it only where it runs the model.
    """
    if 'eager' in engine or engine == 'compiled':
        command = [
            *(__file__, '--task', args.task, '--models', model.name),
            *('--shape', *map(str, args.shape), '--peak-of', engine),
            *('--threads', str(args.threads)),
        ]
    else:
        kind, _, int8 = engine.partition('-')
        path = str(model.onnx(bool(int8)))
        command = [
            *('-c', ALONE, path, kind, str(args.threads), model.photos[0])
        ]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main(argv=None):
    """Time everything; 1 if an exported file computes something else."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    read_safely()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.peak_of:
            model = Model(args.models[0], args, Path(folder))
            make_run(model, args.peak_of, 1).calls['network']()
            # Of `getrusage`, a child inherits its parent's.
            status = Path('/proc/self/status').read_text()
            print(int(re.search(r'VmHWM:\s+(\d+)', status)[1]) / 1024)
            return 0
        return measure(args, Path(folder))


def measure(args, folder):
    """Time all runs in turns, by batch size."""
    device = torch.device('cpu')
    report = Report(
        dict(
            device='cpu',
            device_name=device_name(device),
            threads=args.threads,
            torch=torch.__version__,
            triton='',
            lors_plugin=__version__,
        )
    )
    models, failed = {}, False
    for number in args.batch_sizes:
        runs = []
        for name in args.models:
            for engine in args.engines:
                # Compiling changes a model, so each engine has its own.
                key = name, engine == 'compiled'
                if key not in models:
                    place = folder / f'{name}-{key[1]}'
                    place.mkdir()
                    models[key] = Model(name, args, place)
                if (
                    not models[key].exports
                    and 'eager' not in engine
                    and (engine != 'compiled')
                ):
                    continue
                try:
                    runs.append(make_run(models[key], engine, number))
                except RuntimeError as error:
                    failed = True
                    sys.stderr.write(f'error: {error}\n')
        times = time_in_turns(runs, args.modes, args.repeats, clock=args.clock)
        rows = [
            (run.label, 'float32', mode, 'time', 'ms',
             [1000 * second for second in times[run.label][mode]], run.error)
            for run in runs
            for mode in args.modes
        ]  # fmt: skip
        if args.memory and number == 1:
            for run in runs:
                name, engine = run.label.rsplit(' ', 1)
                model = models[name, engine == 'compiled']
                peak = peak_memory(model, engine, args)
                rows.append(
                    (run.label, 'float32', '', 'memory', 'MB', [peak], None)
                )
        height, width = args.shape
        report.add(
            args.task,
            f'{number} x {height} x {width}',
            dict(batch=number, shape=args.shape, clock=args.clock),
            runs[0].label,
            rows,
        )
    report.write(args.output)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
