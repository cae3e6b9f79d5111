"""Shard units of the decoder by FSDP, in two processes.

``fsdp_runner.py FOLDER`` writes a JSON file for each process: the largest
differences to the outputs of the plain decoder, or the error of a unit.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import torch
from mmengine.registry import DefaultScope
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel

import lors_plugin  # noqa: F401
import lors_plugin.models  # noqa: F401
from lors_plugin.adamixer.box_geometry import boxes_from_sizes
from lors_plugin.registry import MODELS
from lors_plugin.testing import randomize

SIZES = dict(
    num_classes=3,
    num_stages=2,
    embed_dims=32,
    num_groups=2,
    in_points=4,
    out_points=6,
    num_heads=4,
    feedforward_channels=48,
)
UNITS = {
    'LORSAdaMixerDecoder': ['', 'mixing', 'mixing.generator', 'stages.1'],
    'AdaMixerDecoder': ['', 'mixing', 'mixing.1', 'mixing.1.generator'],
}


def make(kind):
    with DefaultScope.overwrite_default_scope('mmdet'):
        config = dict(type=f'lors_plugin.{kind}', **SIZES)
        return randomize(MODELS.build(config))


def shard(decoder, unit):
    sharded = FullyShardedDataParallel(
        decoder.get_submodule(unit), device_id=torch.device('cpu')
    )
    if not unit:
        return sharded
    parent, _, name = unit.rpartition('.')
    setattr(decoder.get_submodule(parent), name, sharded)
    return decoder


def run(decoder, inputs):
    outs = decoder(*inputs)
    sum(out.square().sum() for out in outs).backward()
    return outs


def main(rank, folder):
    store = f'file://{folder}/store'
    distributed.init_process_group(
        'gloo', init_method=store, rank=rank, world_size=2
    )
    torch.manual_seed(0)
    feats = [torch.randn(1, 32, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    xyzr = boxes_from_sizes(torch.tensor([[96.0, 64.0]]))[:, None]
    inputs = feats, torch.randn(1, 7, 32), xyzr.repeat(1, 7, 1)
    found = {}
    for kind, units in UNITS.items():
        wanted = run(make(kind), inputs)
        for unit in units:
            try:
                outs = run(shard(make(kind), unit), inputs)
            except Exception as error:
                found[f'{kind} {unit}'] = str(error)[:200]
                continue
            found[f'{kind} {unit}'] = max(
                (a - b).abs().max().item() for a, b in zip(outs, wanted)
            )
    distributed.destroy_process_group()
    Path(folder, f'rank{rank}.json').write_text(json.dumps(found))


if __name__ == '__main__':
    # What is imported above is imported once.
    context = multiprocessing.get_context('fork')
    ranks = [
        context.Process(target=main, args=(i, sys.argv[1])) for i in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
