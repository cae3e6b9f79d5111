"""What ``reparam.py`` does for each file that it writes."""

import sys
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

from lors_plugin.adapters import (
    AdapterFileError,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
)
from lors_plugin.analysis import test_shape
from lors_plugin.build import build_model
from lors_plugin.checkpoints import read_weights
from lors_plugin.checkpoints.files import (
    checkpoint_writer,
    load_checkpoint_file,
    weights_of,
    write_all,
)
from lors_plugin.reparam.compare import compare_outputs, own_rounding
from lors_plugin.reparam.cost import measure
from lors_plugin.reparam.deploy import deploy
from lors_plugin.reparam.structure import (
    CheckpointError,
    adapt,
    build_base,
    check_scale,
    has_adapters,
    load_base,
    load_whole,
    rename,
    structure_hooks,
)

MILLION, BILLION = 1e6, 1e9


@dataclass
class Job:
    """One file to read and two to write.

    Attributes:
        source (str): The checkpoint or the adapter file.
        out (Path): Where the weights go.
        out_config (Path): Where the config goes.
    """

    source: str
    out: Path
    out_config: Path


class Jobs:
    """All files of one call.

    Args:
        args (:obj:`argparse.Namespace`): The parsed arguments.
        cfg (:obj:`Config`): Of the training.
        images (list[Tensor]): To compare outputs with.
    """

    def __init__(self, args, cfg, images):
        self.args, self.cfg, self.images = args, cfg, images
        self.jobs = self._adapter_jobs() if args.adapter else [self._job()]
        self._check_paths()
        self.base = None

    def all(self):
        """Each job in turn."""
        return self.jobs

    def build(self):
        """Build the model that all start from."""
        self.base = build_base(self.cfg)

    def run(self, job):
        """Merge and write one file; whether outputs are the same."""
        content = load_checkpoint_file(job.source, self.args.trust)
        model = self._adapter_model if self.args.adapter else self._model
        model = model(content, job.source)
        dtype = getattr(torch, self.args.dtype)
        result = deploy(model, self.cfg, dtype)
        print(f'{job.source}: {result.merged} modules merged')
        if not self._same(model, result.model):
            sys.stderr.write(
                f'error: {job.source}: the merged model is not the same '
                f'(tolerance {self.args.tolerance:g}); nothing was written\n'
                + self._excuse(model)
            )
            return False
        self._report_costs(model, result)
        for note in result.notes:
            print(f'  config: {note}')
        writer = checkpoint_writer(
            job.out, result.content(content.get('meta') or {})
        )
        text = result.cfg.pretty_text
        write_all(
            {
                job.out: writer,
                job.out_config: lambda path: path.write_text(
                    text, encoding='utf-8'
                ),
            }
        )
        print(f'  written: {job.out}, {job.out_config}')
        return True

    def _job(self):
        out = Path(self.args.out)
        config = self.args.out_config or out.with_suffix('.py')
        return Job(self.args.checkpoint, out, Path(config))

    def _adapter_jobs(self):
        """Names of the adapters, with those of their directories if equal."""
        paths = [Path(path) for path in self.args.adapter]
        counts = Counter(path.stem for path in paths)
        jobs = []
        for path in paths:
            name = path.stem
            if counts[name] > 1:
                name = f'{path.resolve().parent.name}_{name}'
            out = Path(self.args.out) / f'{name}{path.suffix}'
            jobs.append(Job(str(path), out, out.with_suffix('.py')))
        if len({job.out_config for job in jobs}) < len(jobs):
            raise ValueError(
                f'--adapter: two of {self.args.adapter} have the same name '
                'and directory; merge them in separate calls'
            )
        return jobs

    def _check_paths(self):
        """Before anything that takes time."""
        args = self.args
        inputs = [args.config, *(job.source for job in self.jobs)]
        inputs += filter(None, [args.base])
        for path in inputs[1:]:
            if not Path(path).is_file():
                raise FileNotFoundError(f'the checkpoint {path} is not there')
        inputs = {Path(path).resolve() for path in inputs}
        for job in self.jobs:
            if job.out == job.out_config:
                raise ValueError(
                    f'{job.out} would be both weights and config; name the '
                    'weights .pth or .safetensors, or give --out-config'
                )
            if args.adapter and job.out.parent.is_file():
                raise ValueError(
                    f'{job.out.parent} is a file; with --adapter, OUT_DIR is '
                    'a directory'
                )
            for out in (job.out, job.out_config):
                if out.resolve() in inputs:
                    raise ValueError(
                        f'{out} is read too; write somewhere else (OUT, '
                        '--out-config)'
                    )
                if out.is_dir():
                    raise ValueError(f'{out} is a directory; name a file')
                if out.exists() and not args.force:
                    raise ValueError(f'{out} exists; --force overwrites it')

    def _weights(self, content, path):
        state = weights_of(content, not self.args.no_ema, path)
        return rename(state, self.args.rename)

    def _model(self, content, path):
        """The model of a whole checkpoint."""
        if is_adapter_checkpoint(content):
            raise CheckpointError(
                f'{path} holds adapters without their base; merge it by '
                f'CONFIG OUT_DIR --adapter {path} --base BASE'
            )
        state = self._weights(content, path)
        model = self.base
        hooks = [name for name, _ in structure_hooks(self.cfg)]
        if has_adapters(state) or 'RepAdapterHook' in hooks:
            adapt(model, self.cfg, state, self.args.scale)
        load_whole(model, state, path)
        return model

    def _adapter_model(self, content, path):
        """The base with the adapters of a file; the base itself stays."""
        args = self.args
        base = read_weights(args.base, args.trust, not args.no_ema)
        model = deepcopy(self.base)
        if is_adapter_checkpoint(content):
            if args.no_ema:
                state = self._weights(content, path)
                content = dict(content, state_dict=state)
            replaced = content.get('state_dict') or {}
            check_scale(replaced, args.scale)
            load_base(model, base, list(replaced), args.base)
            try:
                load_adapter_checkpoint(model, content)
            except AdapterFileError as error:
                # Of several files, which one?
                raise CheckpointError(f'{path}: {error}') from error
            return model.eval()
        state = self._weights(content, path)
        if not has_adapters(state):
            raise CheckpointError(
                f'--adapter {path} holds no adapters; keys have to look like '
                'LAYER.rep_adapter.conv_A.weight (--rename helps), and are '
                f'like {list(state)[:2]}'
            )
        load_base(model, base, list(state), args.base)
        adapt(model, self.cfg, state, args.scale)
        own = model.state_dict()
        # The original layout splits differently; loading reads it.
        lacking = {k: v for k, v in own.items() if 'rep_adapter' not in k}
        load_whole(model, {**lacking, **state}, path)
        print(
            f'{path} does not say which base it was trained on: it is not '
            'checked'
        )
        return model

    def _same(self, before, after):
        """Print the differences; whether all are small."""
        found = compare_outputs(before, after, self.images)
        for item in found:
            print(
                f'  largest difference of {item.what}: {item.absolute:.3g} '
                f'({item.relative:.2g} of the largest value)'
            )
        return all(item.within(self.args.tolerance) for item in found)

    def _excuse(self, model):
        """What the model makes of rounding by itself."""
        if not hasattr(model, 'extract_feat'):
            return ''
        share = own_rounding(model, self.images).relative
        return (
            'without merging, its features in float32 are '
            f'{share:.2g} of the largest value from those in float64\n'
        )

    def _report_costs(self, before, result):
        """Print what the plain, the trained and the merged model cost."""
        if not self.args.repeats:
            return
        plain = build_model(result.cfg).eval()
        shape = tuple(self.args.shape or test_shape(self.cfg))
        names = ('plain', 'before', 'merged')
        costs = measure(
            [plain, before, result.model],
            shape,
            self.args.batches,
            self.args.repeats,
        )
        times = ''.join(f'{f"batch {n}":>14}' for n in self.args.batches)
        print(f'  {"":<8}{"parameters":>14}{"mult-adds":>14}{times}')
        for name, cost in zip(names, costs):
            cells = [
                f'{cost.parameters / MILLION:.3f} M',
                f'{cost.multiply_adds / BILLION:.3f} G',
                *(f'{1000 * s:.1f} ms' for s in cost.seconds.values()),
            ]
            print(f'  {name:<8}' + ''.join(f'{cell:>14}' for cell in cells))
