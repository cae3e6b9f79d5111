"""Trainings of the adapter benchmark, one after the other in one process."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

import lors_plugin  # noqa: F401  (makes mmcv.ops importable)

ROOT = Path(__file__).resolve().parents[2]
PAGE = 'docs/en/benchmarks/rep_adapter.md'
RESULT = 'result.json'
CONFIG = 'configs/rep_adapter/vit-small-p14_{}_elpv-70px.py'
METRIC = 'accuracy/top1'

logger = logging.getLogger('rep_adapter')


class BenchmarkError(RuntimeError):
    """The benchmark cannot go on; the message says why."""


@dataclass
class Arm:
    """One way to adapt the model.

    Attributes:
        name (str): For tables.
        config (str): Its config, from the root of the repository.
        options (dict): Entries of the config to override.
    """

    name: str
    config: str
    options: dict = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """str: The name without blanks, for folders."""
        return self.name.lower().replace(' ', '-').replace(',', '')

    def load(self, options: dict | None = None) -> Config:
        """Load the config.

        Args:
            options (dict, optional): More entries to override. Defaults to
                None.

        Returns:
            Config: With absolute paths, so that the current folder does not
            matter.
        """
        cfg = Config.fromfile(ROOT / self.config)
        cfg.merge_from_dict(self.options)
        cfg.merge_from_dict(options or {})
        for split in ('train', 'val', 'test'):
            data = cfg[f'{split}_dataloader'].dataset
            data.data_root = str(ROOT / data.data_root)
        backbone = cfg.model.backbone
        start = backbone.get('module', backbone).get('init_cfg')
        if start:
            start.checkpoint = str(ROOT / start.checkpoint)
        return cfg


def adapter_arm(placement: str, scale: float) -> Arm:
    """An arm with adapters.

    Args:
        placement (str): 'block' or 'attn'.
        scale (float): Scale of the adapters.

    Returns:
        Arm: The arm.
    """
    return Arm(
        f'RepAdapter {placement}, scale {scale:g}',
        CONFIG.format('rep-adapter'),
        {
            'custom_hooks.0.placement': placement,
            'custom_hooks.0.scale': scale,
        },
    )


ARMS = [
    Arm('linear probe', CONFIG.format('linear-probe')),
    Arm('full tuning', CONFIG.format('full')),
    Arm(
        'full tuning lr 1e-5',
        CONFIG.format('full'),
        {'optim_wrapper.optimizer.lr': 1e-5},
    ),
    Arm('LoRA', CONFIG.format('lora')),
    *(adapter_arm(p, s) for p in ('block', 'attn') for s in (1.0, 5.0)),
]


def scaled_arms(config: str, scales: Sequence[float]) -> list[Arm]:
    """The same config with every scale.

    Args:
        config (str): A config with ``RepAdapterHook``, from the root of the
            repository or absolute.
        scales (Sequence[float]): Scales of the adapters.

    Returns:
        list[Arm]: One a scale.
    """
    hooks = Config.fromfile(ROOT / config).get('custom_hooks', [])
    places = [
        i
        for i, hook in enumerate(hooks)
        if hook.type == 'lors_plugin.RepAdapterHook'
    ]
    if not places:
        raise BenchmarkError(f'{config} has no RepAdapterHook')
    return [
        Arm(f'scale {s:g}', config, {f'custom_hooks.{places[0]}.scale': s})
        for s in scales
    ]


def check_inputs(cfg: Config) -> None:
    """Refuse to begin without data and weights.

    Args:
        cfg (Config): Of an arm.
    """
    backbone = cfg.model.backbone
    start = backbone.get('module', backbone).get('init_cfg')
    files = [cfg.train_dataloader.dataset.data_root]
    files += [start.checkpoint] if start else []
    for path in files:
        if not Path(path).exists():
            raise BenchmarkError(
                f'{path} does not exist: {PAGE} says how to get it'
            )


def trained_parameters(model: nn.Module) -> int:
    """Count the parameters that are trained.

    Args:
        model (nn.Module): The model.

    Returns:
        int: Numbers in them.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def train_run(
    arm: Arm, seed: int, work_dir: Path, options: dict, test: bool = True
) -> dict:
    """Train, choose by the validation split, test once.

    Args:
        arm (Arm): What to train.
        seed (int): Of the run.
        work_dir (Path): Folder of the run.
        options (dict): Entries of the config to override.
        test (bool): Whether to test at all. Defaults to True.

    Returns:
        dict: The results.
    """
    cfg = arm.load(options)
    check_inputs(cfg)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f'{work_dir.name}_{time.time_ns()}'
    start = time.perf_counter()
    runner = Runner.from_cfg(cfg)
    runner.train()
    minutes = (time.perf_counter() - start) / 60
    hub = runner.message_hub
    curve, _ = hub.get_scalar(f'val/{METRIC}').data
    best = Path(hub.get_info('best_ckpt'))
    score = None
    if test:
        runner.load_checkpoint(str(best), map_location='cpu')
        score = round(float(runner.test()[METRIC]), 2)
    return dict(
        arm=arm.name,
        seed=seed,
        val=float(hub.get_info('best_score')),
        val_curve=[round(float(v), 2) for v in curve],
        test=score,
        best=best.name,
        checkpoint_bytes=best.stat().st_size,
        trained=trained_parameters(runner.model),
        minutes=round(minutes, 2),
        options=options,
    )


def run_all(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    work_dir: Path,
    options: dict | None = None,
    test: bool = True,
) -> list[dict]:
    """Train what is not finished, seed by seed.

    Args:
        arms (Sequence[Arm]): What to train.
        seeds (Sequence[int]): A run for each.
        work_dir (Path): Folder of all runs.
        options (dict, optional): Entries of all configs to override.
            Defaults to None.
        test (bool): Whether to test at all. Defaults to True.

    Returns:
        list[dict]: Results of all runs.
    """
    # The CPU's fused attention is slower than the plain one for 26 tokens.
    torch.backends.cuda.enable_flash_sdp(False)
    options = options or {}
    results = []
    for seed in seeds:
        for arm in arms:
            folder = work_dir / f'{arm.folder}_seed{seed}'
            path = folder / RESULT
            if path.is_file():
                result = json.loads(path.read_text())
                if result['options'] != options:
                    raise BenchmarkError(
                        f'{path} was made with other options: choose another '
                        f'--work-dir or delete {folder}'
                    )
            else:
                logger.info('%s, seed %d: begins', arm.name, seed)
                result = train_run(arm, seed, folder, options, test)
                path.write_text(json.dumps(result, indent=1) + '\n')
                logger.info(
                    '%s, seed %d: val %.1f, test %s, %.1f minutes',
                    arm.name, seed, result['val'], result['test'],
                    result['minutes'],
                )  # fmt: skip
            results.append(result)
    return results
