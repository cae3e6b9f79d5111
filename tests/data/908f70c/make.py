"""Record what commit 908f70c writes and promises, for tests of later code.

    git worktree add OLD 908f70c
    PYTHONPATH=OLD python tests/data/908f70c/make.py

Writes into its own folder and refuses any other commit. What the files mean
and how they are read is in ``tests/test_compatibility.py``, whose functions
compute all outputs that are recorded here:

- ``*.pt``: weights of the models in ``cases.json``, and checkpoints after the
  first of two epochs of the runs in ``runs.json``
- ``llama``: a language model with experts, as ``save_pretrained`` writes it
- ``images``, ``annotations.json``: what the runs train on
- ``inputs.npz``, ``outputs.npz``: what goes into each and comes out
- ``weights.json``, ``state_dicts.json.gz``: of every config in ``configs``
- ``interfaces.json``: names, registry names and command lines

No path of the machine gets into the files. Weights are random everywhere, and
each is checked to have an influence on what is recorded.
"""

import gzip
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from networks import CASES, SIDE, runs
from torch import nn

import lors_plugin

COMMIT = '908f70c'
HERE = Path(__file__).resolve().parent
OLD = Path(lors_plugin.__file__).resolve().parents[1]
IMAGES = 4
SEEDS = 50

# Names in pages of docs, README and configs. Those of lors_plugin.ops that no
# page names carry sums and levels between its parts, and go.
PACKAGES = (
    'lors_plugin',
    'lors_plugin.adapters',
    'lors_plugin.analysis',
    'lors_plugin.language',
    'lors_plugin.lors',
    'lors_plugin.models',
    'lors_plugin.ops',
    'lors_plugin.reparam',
    'lors_plugin.visualization',
)
INTERNAL = {
    'lors_plugin.ops': (
        'GradientSum',
        'checkpoint_with_sums',
        'low_rank_linear',
        'share_levels',
    )
}
REGISTRIES = ('MODELS', 'HOOKS', 'METRICS', 'OPTIM_WRAPPERS')
TOOL_FOLDERS = (
    '.',
    'analysis_tools',
    'dataset_converters',
    'model_converters',
)
SCRIPTS = (
    'dist_train.sh',
    'dist_test.sh',
    'slurm_train.sh',
    'slurm_test.sh',
    'quickstart.sh',
)


def randomize(model):
    """Random weights also where fresh ones are 0 or 1, and statistics."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.add_(0.5)  # narrow networks stay alive
        for name, buffer in model.named_buffers():
            if name.endswith('running_var'):
                buffer.uniform_(0.5, 2)
            elif name.endswith('running_mean'):
                buffer.normal_(std=0.3)


def without_influence(model, compute):
    """Names of weights that could be wrong unseen."""
    flags = [param.requires_grad for param in model.parameters()]
    for param in model.parameters():
        param.requires_grad_(param.numel() > 0)
    with torch.enable_grad():
        sum(out.square().sum() for out in compute(model, grad=True)).backward()
    unseen = [
        key
        for key, param in model.named_parameters()
        if param.numel() and (param.grad is None or not param.grad.any())
    ]
    model.zero_grad()
    for param, flag in zip(model.parameters(), flags):
        param.requires_grad_(flag)
    return unseen


def write_json(name, content):
    """A file that is read by people, too."""
    text = json.dumps(content, indent=1, sort_keys=True)
    (HERE / name).write_text(text + '\n')


def make_data():
    """Images with a rectangle each, and random inputs."""
    rng = np.random.default_rng(0)
    boxes, images = [], []
    for i in range(IMAGES):
        pixels = np.full((SIDE, SIDE, 3), rng.integers(0, 90, 3), np.uint8)
        x, y, w, h = (int(v) for v in rng.integers(16, 32, 4))
        pixels[y : y + h, x : x + w] = rng.integers(120, 255, 3)
        path = HERE / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels)
        name = path.relative_to(HERE / 'images').as_posix()
        images.append(dict(id=i, file_name=name, width=SIDE, height=SIDE))
        box = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0)
        boxes.append(dict(box, id=i, image_id=i, category_id=i % 2))
    categories = [dict(id=0, name='a'), dict(id=1, name='b')]
    content = dict(images=images, annotations=boxes, categories=categories)
    write_json('annotations.json', content)
    np.savez_compressed(
        HERE / 'inputs.npz',
        images=rng.integers(0, 256, (2, 3, SIDE, SIDE), np.uint8),
        vectors=rng.normal(size=(4, 7)).astype(np.float32),
        tokens=rng.integers(3, 31, (2, 10)),
    )


def make_cases(tests):
    """Weights of every model and its outputs."""
    outputs = {}
    cases = {n: dict(default_scope=s, model=m) for n, (s, m) in CASES.items()}
    write_json('cases.json', cases)
    for name, cfg in cases.items():
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = tests.build(cfg)
            model.init_weights()
            randomize(model)
            stack = hasattr(model, 'down')
            compute = tests.compute_stack if stack else tests.compute
            unseen = without_influence(model, compute)
            if not unseen:
                break
        else:
            raise RuntimeError(f'{name}: nothing depends on {unseen}')
        torch.save(dict(state_dict=model.state_dict()), HERE / f'{name}.pt')
        outputs[name] = compute(model)
        print(f'{name}: seed {seed}')
    return outputs


def make_runs(tests):
    """Checkpoints after one epoch, and outputs then and after two."""
    outputs, configs = {}, json.loads(json.dumps(runs()))
    write_json('runs.json', configs)
    for name, cfg in configs.items():
        folder = HERE / 'work'
        tests.make_runner(cfg, Path('work')).train()
        content = torch.load(folder / 'epoch_1.pth', weights_only=False)
        # The only path of this machine, which nothing reads.
        content['message_hub']['runtime_info']['last_ckpt'] = 'epoch_1.pth'
        torch.save(content, HERE / f'{name}.pt')
        shutil.rmtree(folder)
        half = dict(cfg, load_from=f'{name}.pt')
        outputs[name] = tests.compute_tested(half, folder)
        rest = dict(half, resume=True)
        model = tests.make_runner(rest, folder).train()
        outputs[f'{name}_resumed'] = tests.compute(model)
        shutil.rmtree(folder)
        gap = outputs[name][0] - outputs[f'{name}_resumed'][0]
        print(f'{name}: an epoch changes outputs by {gap.abs().max():.2g}')
    return outputs


def make_merged(tests):
    """What ``tools/reparam.py`` makes of an adapted model."""
    cfg, folder = json.loads((HERE / 'runs.json').read_text()), HERE / 'work'
    folder.mkdir()
    Config(cfg['adapters']).dump(folder / 'config.py')
    command = [OLD / 'tools/reparam.py', folder / 'config.py', 'adapters.pt']
    command += [folder / 'merged.pt', '--repeats', '0']
    subprocess.run([sys.executable, *map(str, command)], check=True)
    shutil.copy(folder / 'merged.pt', HERE / 'merged.pt')
    cfg = Config.fromfile(folder / 'merged.py').to_dict()
    shutil.rmtree(folder)
    cfg = {key: cfg[key] for key in ('default_scope', 'model')}
    cases = dict(tests.read('cases.json'), merged=cfg)
    write_json('cases.json', cases)
    model = tests.build(cases['merged'])
    load_checkpoint(model, str(HERE / 'merged.pt'), 'cpu', strict=True)
    return dict(merged=tests.compute(model))


def make_llama(tests):
    """A language model with experts in one of its two layers."""
    import transformers

    from lors_plugin.language import add_experts

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )
    add_experts(model, 'gate', num_experts=3, layers=[-1])
    randomize(model)
    model.save_pretrained(HERE / 'llama')
    return dict(llama=tests.compute_text(model))


def make_weights(tests, remove_pretrained):
    """Keys, shapes and counts of every config."""
    table, states = {}, {}
    paths = (OLD / 'configs').glob('[!_]*/*.py')
    for path in sorted(p.relative_to(OLD).as_posix() for p in paths):
        cfg = Config.fromfile(OLD / path)
        remove_pretrained(cfg.model)
        model = tests.build_weightless(cfg)
        state = {k: list(v.shape) for k, v in model.state_dict().items()}
        text = json.dumps(state, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        states[digest] = state
        table[path] = dict(tests.count(model), state_dict=digest)
    write_json('weights.json', table)
    text = json.dumps(states, sort_keys=True).encode()
    packed = gzip.compress(text, mtime=0)
    (HERE / 'state_dicts.json.gz').write_bytes(packed)


def make_interfaces(tests):
    """Names, registry names and command lines."""
    names = {}
    for package in PACKAGES:
        public = set(importlib.import_module(package).__all__)
        names[package] = sorted(public - set(INTERNAL.get(package, ())))
    registries = {}
    for name in REGISTRIES:
        registry = getattr(importlib.import_module(PACKAGES[0] + '.registry'),
                           name)  # fmt: skip
        registry.import_from_location()
        registries[name] = sorted(registry.module_dict)
    tests.ROOT, tools, folder = OLD, {}, OLD / 'tools'
    for path in sorted(
        p for f in TOOL_FOLDERS for p in (folder / f).glob('*')
    ):
        text = path.read_text() if path.suffix == '.py' else ''
        if "__name__ == '__main__'" in text:
            name = path.relative_to(folder).as_posix()
            tools[name] = tests.options_of(name)
    scripts = {}
    for name in SCRIPTS:
        command = ['bash', folder / name, '--help']
        result = subprocess.run(command, capture_output=True, text=True)
        text = result.stdout + result.stderr
        words = re.findall(
            r'--[a-z][\w-]+|[A-Z_]{4,}(?= \()|[A-Z]+(?==)', text
        )
        usage = re.search(r'^Usage: (.*)$', text, re.MULTILINE)[1]
        scripts[name] = [usage, *sorted(set(words))]
    write_json(
        'interfaces.json',
        dict(names=names, registries=registries, tools=tools, scripts=scripts),
    )


def load_module(path):
    """A module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    """Make all files anew."""
    head = subprocess.run(
        ['git', '-C', str(OLD), 'rev-parse', 'HEAD'],
        capture_output=True,
        text=True,
    ).stdout
    if not head.startswith(COMMIT):
        sys.exit(f'error: {OLD} is no checkout of {COMMIT}; see the docstring')
    tests = load_module(HERE.parents[1] / 'test_compatibility.py')
    conftest = load_module(HERE.parents[1] / 'conftest.py')
    os.chdir(HERE)
    make_data()
    outputs = make_cases(tests)
    outputs |= make_runs(tests) | make_merged(tests) | make_llama(tests)
    arrays = {
        f'{name}/{i}': value.numpy()
        for name, values in outputs.items()
        for i, value in enumerate(values)
    }
    np.savez_compressed(HERE / 'outputs.npz', **arrays)
    make_weights(tests, conftest.remove_pretrained)
    make_interfaces(tests)


if __name__ == '__main__':
    main()
