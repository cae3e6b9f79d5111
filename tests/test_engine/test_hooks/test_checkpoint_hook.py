"""No kill, full disk, notice or crafted checkpoint loses a run or a file."""

import itertools
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from lors_plugin.checkpoints import load_checkpoint_file, save_checkpoint_file
from lors_plugin.engine.hooks.checkpoint_hook import (
    EXIT_REQUEUE,
    CheckpointWriteError,
    ResumeError,
)

NUMBER = itertools.count()


class Numbers(Dataset):
    """Eight inputs with noise, as an augmentation would add it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.full((4,), index / 8)
        return dict(x=x + torch.rand(4) / 9, index=index)


class Model(BaseModel):
    """A model that draws random numbers and notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.seen = []

    def forward(self, x, index, mode='tensor'):
        out = self.layers(torch.stack(list(x)))
        if mode != 'loss':
            return [float(value) for value in out]
        self.seen.append([int(i) for i in index])
        return dict(loss=out.square().mean())


class Score(BaseMetric):
    """A metric that improves from one validation to the next."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(acc=self.score(), auc=self.score())


class At(Hook):
    """Do something once, before a step or a batch of a validation."""

    priority = 'LOWEST'

    def __init__(self, action, step=None, val=None):
        self.action, self.step, self.val = action, step, val

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.step:
            self.action()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if (runner.epoch, batch_idx) == self.val:
            self.action()


def make(
    folder,
    at=None,
    resume=None,
    epochs=3,
    workers=0,
    batch=2,
    loop=None,
    sampler='DefaultSampler',
    **cfg,
):
    """A runner: four steps an epoch, a validation after each."""
    torch.manual_seed(0)
    model = Model()
    loader = dict(
        batch_size=batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        dataset=Numbers(),
        sampler=dict(type=sampler, shuffle=True),
    )
    metric = Score()
    hooks = [dict(type='EMAHook', momentum=0.1)] + ([at] if at else [])
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader,
        val_dataloader=dict(
            loader, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        val_evaluator=[metric],
        val_cfg=dict(),
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.01)),
        param_scheduler=dict(
            type='LinearLR', start_factor=0.1, by_epoch=False, end=9
        ),
        default_hooks=dict(
            epoch_seed=dict(type='lors_plugin.EpochSeedHook'),
            checkpoint=dict(
                type='lors_plugin.CheckpointHook',
                **dict(
                    dict(interval=1, max_keep_ckpts=1, save_best='acc'), **cfg
                ),
            ),
        ),
        custom_hooks=hooks,
        randomness=dict(seed=4),
        resume=bool(resume),
        load_from=resume if isinstance(resume, str) else None,
        experiment_name=f'{folder.name}_{next(NUMBER)}',
        log_level='ERROR',
    )
    metric.score = lambda: float(runner.epoch)
    return runner


def train(folder, **kwargs):
    """Train; return the batches of each step."""
    runner = make(folder, **kwargs)
    runner.train()
    return runner.model.seen


def files(folder):
    """What a run leaves besides logs and its config."""
    names = (p.name for p in folder.iterdir() if not p.is_dir())
    return sorted(name for name in names if not name.endswith('.py'))


def last(folder):
    """What ``last_checkpoint`` names."""
    return load_checkpoint_file((folder / 'last_checkpoint').read_text())


def assert_same(first, second):
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    assert first['meta']['iter'] == second['meta']['iter']


@pytest.fixture(autouse=True)
def handlers_as_before():
    """A training restores what signals do, however it ends."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The batches of each step and the last checkpoint."""
    results = {}
    for workers in (0, 1):
        folder = tmp_path_factory.mktemp(f'whole{workers}')
        results[workers] = train(folder, workers=workers), last(folder)
    return results


@pytest.mark.parametrize(
    ('number', 'moment', 'steps', 'workers'),
    [
        (signal.SIGTERM, dict(step=0), 1, 0),
        (signal.SIGUSR1, dict(step=5), 6, 0),
        (signal.SIGTERM, dict(step=5), 6, 1),
        (signal.SIGTERM, dict(step=7), 8, 0),  # the last one of an epoch
        (signal.SIGUSR1, dict(val=(2, 1)), 8, 1),
    ],
)
def test_notice(tmp_path, uninterrupted, moment, steps, workers, number):
    """The step is finished, and the rest comes out as if nothing was."""
    at = At(lambda: signal.raise_signal(number), **moment)
    runner = make(tmp_path, at=at, workers=workers)
    with pytest.raises(SystemExit) as error:
        runner.train()
    assert error.value.code == EXIT_REQUEUE
    assert len(runner.model.seen) == steps
    assert last(tmp_path)['meta']['iter'] == steps
    assert Path((tmp_path / 'last_checkpoint').read_text()).name == (
        'interrupted.pth'
    )

    seen, whole = uninterrupted[workers]
    rest = train(tmp_path, workers=workers, resume=True)
    assert runner.model.seen + rest == seen
    assert_same(last(tmp_path), whole)
    assert files(tmp_path) == [
        'best_acc_epoch_3.pth', 'epoch_3.pth', 'last_checkpoint'
    ]  # fmt: skip


def stopped(folder, **kwargs):
    """Train until a notice in the second epoch."""
    at = At(lambda: signal.raise_signal(signal.SIGTERM), step=5)
    with pytest.raises(SystemExit):
        train(folder, at=at, **kwargs)


def test_other_batches_within_an_epoch_are_refused(tmp_path):
    stopped(tmp_path)
    with pytest.raises(ResumeError, match='2 of 4 batches .* now .* 8 batch'):
        train(tmp_path, resume=True, batch=1)


def test_iterations(tmp_path):
    """Loops over iterations go on with the same data."""
    loop = dict(by_epoch=False, max_iters=10, val_interval=20)
    cfg = dict(loop=loop, by_epoch=False, interval=100)
    cfg['sampler'] = 'InfiniteSampler'
    seen = train(tmp_path / 'whole', **cfg)
    stopped(tmp_path / 'parts', **cfg)
    rest = train(tmp_path / 'parts', resume=True, **cfg)
    assert rest == seen[6:]


def test_accumulated_gradients_are_used_first(tmp_path):
    runner = make(
        tmp_path, at=At(lambda: signal.raise_signal(signal.SIGTERM), step=0)
    )
    runner.optim_wrapper.update(accumulative_counts=3)
    with pytest.raises(SystemExit):
        runner.train()
    assert last(tmp_path)['meta']['iter'] == 3


PROGRAM = """
import os, signal, subprocess, sys
from pathlib import Path
from test_checkpoint_hook import At, last, make, train

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
for index, name in enumerate(('fsync', 'replace', 'unlink')):
    pid = os.fork()
    if pid == 0:
        # Files are written whole, flushed, renamed; then old ones go.
        target = Path if name == 'unlink' else os
        act = At(lambda: setattr(target, name, die), step=7)
        train(folder / name, at=act, epochs=3)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status

def children():
    tasks = Path('/proc/self/task').glob('*/children')
    return {int(pid) for path in tasks for pid in path.read_text().split()}

def notify():
    workers = [str(pid) for pid in children() - others]
    print('workers:', *workers, flush=True)
    subprocess.run(['kill', '-TERM', *workers], check=True)
    signal.raise_signal(signal.SIGTERM)

others = children()
runner = make(folder / 'notice', at=At(notify, step=5), workers=1)
try:
    runner.train()
    sys.exit('did not stop')
except SystemExit as stop:
    assert stop.code == 75, stop.code
assert last(folder / 'notice')['meta']['iter'] == 6
"""


@pytest.fixture(scope='module')
def program(quick_python, tmp_path_factory):
    """What a process of its own printed, and where its runs are."""
    folder = tmp_path_factory.mktemp('program')
    path = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    done = subprocess.run(
        [quick_python, '-c', PROGRAM, folder],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout, folder


@pytest.mark.slow
def test_workers_outlive_a_notice_and_end_with_their_parent(program):
    """The notice often goes to all processes of a job."""
    (line,) = re.findall('^workers: (.*)$', program[0], re.MULTILINE)
    assert line.split()
    assert not [p for p in line.split() if Path(f'/proc/{p}').exists()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'steps'), [('fsync', 4), ('replace', 4), ('unlink', 8)]
)
def test_kill_while_writing(program, uninterrupted, name, steps):
    """In any phase of it: the checkpoint before is whole, or the new one."""
    seen, whole = uninterrupted[0]
    folder = program[1] / name
    assert last(folder)['meta']['iter'] in (4, steps)
    left = [p for p in files(folder) if p.endswith('.tmp')]
    assert left or name == 'unlink'
    rest = train(folder, resume=True)
    assert rest in (seen[4:], seen[8:])
    assert_same(last(folder), whole)
    assert not [p for p in files(folder) if p.endswith('.tmp')]
    assert [p for p in files(folder) if p.startswith('epoch')] == [
        'epoch_3.pth'
    ]


def test_full_disk(tmp_path, uninterrupted):
    """What was there stays, and the training goes on once there is room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    try:
        with pytest.raises(CheckpointWriteError, match='make room'):
            train(tmp_path, at=At(fill, step=7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last(tmp_path)['meta']['iter'] == 4
    assert not [p for p in files(tmp_path) if p.endswith('.tmp')]
    train(tmp_path, resume=True)
    assert_same(last(tmp_path), uninterrupted[0][1])


def test_resume_in_another_directory_leaves_the_old_one(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    train(old, epochs=2)
    before = {name: (old / name).read_bytes() for name in files(old)}
    new.mkdir()
    # Of another run, with the names that the resumed one had.
    for name in ('best_acc_epoch_2.pth', 'epoch_2.pth'):
        (new / name).write_text('another run')
    train(new, epochs=4, resume=str(old / 'epoch_2.pth'))
    assert {name: (old / name).read_bytes() for name in files(old)} == before
    assert files(new) == [
        'best_acc_epoch_2.pth', 'best_acc_epoch_4.pth', 'epoch_2.pth',
        'epoch_4.pth', 'last_checkpoint',
    ]  # fmt: skip


@pytest.mark.parametrize('key', ['best_ckpt', 'best_ckpt_acc'])
def test_crafted_checkpoints_delete_nothing(tmp_path, key):
    """Whatever the message hub says, files and trees elsewhere stay."""
    run = tmp_path / 'run'
    metrics = ['acc', 'auc'] if key == 'best_ckpt_acc' else 'acc'
    train(run, epochs=1, save_best='acc')
    victims = [tmp_path / 'victim.pth', tmp_path / 'best_acc_epoch_1.pth']
    victims += [run / 'notes.txt', run / 'tree' / 'a.pth']
    victims += [run / 'epoch_7.pth' / 'b.pth']  # a directory
    for path in victims:
        path.parent.mkdir(exist_ok=True)
        path.write_text('keep me')
    (run / 'epoch_8.pth').symlink_to(victims[0])
    link = run / 'best_acc_epoch_9.pth'
    link.symlink_to(victims[1])
    content = load_checkpoint_file(run / 'epoch_1.pth')
    info = content['message_hub']['runtime_info']
    for best in (*victims[:4], run / 'tree', link, '../victim.pth', 3):
        info[key] = str(best) if isinstance(best, Path) else best
        info['keep_ckpt_ids'] = ['/../../victim', 7, 8, 1, '1/../x', -1]
        save_checkpoint_file(content, run / 'epoch_1.pth')
        (run / 'last_checkpoint').write_text(str(run / 'epoch_1.pth'))
        train(run, epochs=2, resume=True, save_best=metrics)
        for path in victims:
            assert path.read_text() == 'keep me', (best, path)
        assert link.is_symlink() and (run / 'epoch_8.pth').is_symlink()
        assert last(run)['meta']['epoch'] == 2
