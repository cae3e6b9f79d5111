"""Train and test the runs of a study in child processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from study import ROOT, Run, Study, StudyError

EXIT_STOPPED = 75
PREDICTIONS = 'predictions.pkl'


class RunFailedError(RuntimeError):
    """A run did not come to its end."""


class StoppedError(Exception):
    """A signal asked to stop."""


@dataclass
class Job:
    """A run with a seed.

    Attributes:
        run (Run): The run.
        seed (int): The seed.
        folder (Path): Working directory of the training.
        recipe (list[str]): Script, its first argument (the config), and
            further arguments; those end with ``--cfg-options`` if the run has
            a config.
        paths (list[str]): Options that make paths of data absolute.
        counts (dict[str, int]): Parameters.
    """

    run: Run
    seed: int
    folder: Path
    recipe: list[str]
    paths: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """str: For messages."""
        return f'{self.run.name}, seed {self.seed}'

    def result(self) -> dict | None:
        """Read the results, if the run is finished.

        Returns:
            dict, optional: The results.

        Raises:
            StudyError: If the folder belongs to a run of another recipe.
        """
        recipe = read_json(self.folder / 'recipe.json')
        if recipe not in (None, self.recipe):
            raise StudyError(
                f'{self.folder} was trained by another command '
                f'({shlex.join(recipe)} instead of '
                f'{shlex.join(self.recipe)}): choose another --work-dir or '
                'delete it'
            )
        return read_json(self.folder / 'result.json')

    def checkpoint(self) -> Path:
        """The last checkpoint, or the best one if the run asks for that."""
        if not self.run.best:
            name = (self.folder / 'last_checkpoint').read_text()
            return self.folder / Path(name).name
        found = list(self.folder.glob('best_*.pth'))
        if len(found) != 1:
            raise RunFailedError(
                f'{self.folder} has {len(found)} files best_*.pth instead of '
                'one'
            )
        return found[0]


def read_json(path: Path) -> object:
    """Read a JSON file; None if there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(content: object, path: Path) -> None:
    """Write a JSON file that is whole or absent."""
    beside = path.with_suffix('.tmp')
    beside.write_text(json.dumps(content, indent=1) + '\n')
    beside.replace(path)


class Children:
    """Child processes, which are asked to stop when this process is."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[int] = set()

    def listen(self) -> None:
        """From now on forward SIGTERM, and Ctrl-C and a hangup as SIGTERM.

        tools/train.py then saves a checkpoint before it ends.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = True
        for pid in list(self._running):
            os.kill(pid, signal.SIGTERM)

    def run(self, words: Sequence[str], log: Path) -> int:
        """Run a command and append its output to a file.

        Args:
            words (Sequence[str]): Script and arguments.
            log (Path): The file.

        Returns:
            int: The peak of its resident memory, in bytes.

        Raises:
            RunFailedError: If it fails.
            StoppedError: If a signal stopped it.
        """
        if self.stopped:
            raise StoppedError
        environment = dict(os.environ)
        environment.setdefault('OMP_NUM_THREADS', '1')
        # The package of this checkout, whatever else is installed.
        paths = [str(ROOT), environment.get('PYTHONPATH', '')]
        environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, *words]
        with log.open('a') as file:
            file.write(f'{shlex.join(command)}\n')
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                # Ctrl-C reaches this process alone.
                start_new_session=True,
            )
        self._running.add(process.pid)
        if self.stopped:  # since the check above
            os.kill(process.pid, signal.SIGTERM)
        _, status, usage = os.wait4(process.pid, 0)
        self._running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 0:
            unit = 1 if sys.platform == 'darwin' else 1024
            return usage.ru_maxrss * unit
        if self.stopped or process.returncode == EXIT_STOPPED:
            raise StoppedError
        last = log.read_text(errors='replace').splitlines()[-5:]
        end = '\n'.join(f'  {line}' for line in last)
        raise RunFailedError(
            f'exit code {process.returncode}; {log} ends with\n{end}'
        )


def execute(
    job: Job, study: Study, children: Children, start: Job | None
) -> None:
    """Train and test a run and write its results.

    Args:
        job (Job): The run.
        study (Study): The study.
        children (Children): Runs the commands.
        start (Job, optional): The run whose weights it loads.
    """
    if job.result() is not None:
        return
    paths = list(job.paths)
    if start is not None:
        paths.append(f'load_from={start.checkpoint()}')
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.recipe, job.folder / 'recipe.json')
    script, config, *options = job.recipe
    trained = job.folder / 'trained.json'
    if not trained.is_file():
        words = [script, config, '--work-dir', str(job.folder)]
        if job.run.config and (job.folder / 'last_checkpoint').is_file():
            words.append('--resume')
        log = job.folder / 'train.log'
        print(f'{job.name}: training, log in {log}', flush=True)
        peak = children.run([*words, *options, *paths], log)
        write_json(dict(peak_memory=peak), trained)
    if job.run.test:
        folder = job.folder / 'test'
        folder.mkdir(exist_ok=True)
        words = ['tools/test.py', config, str(job.checkpoint())]
        words += ['--work-dir', str(folder)]
        if study.measure:
            words += ['--out', str(folder / PREDICTIONS)]
        log = job.folder / 'test.log'
        children.run([*words, *options, *job.paths], log)
    result = collect(job, study) | job.counts | read_json(trained)
    write_json(result, job.folder / 'result.json')
    values = [f'{k} {v:.{study.digits}f}' for k, v in result['values'].items()]
    print(f'{job.name}: {", ".join(values)}', flush=True)


def read_logs(folder: Path) -> tuple[dict[str, dict], list[float]]:
    """Read what a training logged, parts of a resumed one joined.

    Args:
        folder (Path): Has ``*/vis_data/scalars.json``.

    Returns:
        tuple: For each key of evaluations the values by step, where later
        ones replace earlier ones, and the seconds of all logged iterations.
    """
    series, seconds = defaultdict(dict), []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off when the training was killed
            if 'loss' in record:
                seconds.append(record['time'])
                continue
            for key, value in record.items():
                series[key][record['step']] = value
    return series, seconds


def collect(job: Job, study: Study) -> dict:
    """Collect what a training and its test logged.

    Args:
        job (Job): The run.
        study (Study): Says which metrics count.

    Returns:
        dict: ``values`` of the metrics by label, ``curve`` of the first one
        of the training as pairs of step and value, ``iteration_seconds``,
        the median.
    """
    series, seconds = read_logs(job.folder)
    tested = {}
    for path in sorted(job.folder.glob('test/*/*.json')):
        tested = json.loads(path.read_text())
    if study.measure and job.run.test:
        tested |= study.measure(job.folder / 'test' / PREDICTIONS)
    values, curve, step = {}, [], None
    for label, (key, factor) in study.metrics.items():
        kind, name = key.split('/', 1)
        if kind == 'test' and name in tested:
            values[label] = factor * tested[name]
        elif kind == 'val' and name in series:
            steps = series[name]
            if job.run.best and step is None:
                step = max(steps, key=steps.get)
            chosen = max(steps) if step is None else step
            values[label] = factor * steps[chosen]
            curve = curve or [[k, factor * v] for k, v in steps.items()]
    if not values:
        keys = ', '.join(key for key, _ in study.metrics.values())
        raise RunFailedError(f'{job.folder} has logged none of {keys}')
    return dict(
        run=job.run.name,
        seed=job.seed,
        recipe=job.recipe,
        values=values,
        curve=curve,
        iteration_seconds=median(seconds) if seconds else None,
    )


def run_chain(
    chain: Sequence[Job], study: Study, children: Children
) -> list[str]:
    """Train and test runs one after the other.

    Args:
        chain (Sequence[Job]): Runs of a seed; those that others start from
            come first.
        study (Study): The study.
        children (Children): Runs the commands.

    Returns:
        list[str]: A message for each run that failed.
    """
    jobs, failed = {job.run.name: job for job in chain}, {}
    for job in chain:
        start = jobs.get(job.run.start)
        try:
            if job.run.start in failed:
                raise RunFailedError(f'{start.name} has not come to its end')
            execute(job, study, children, start)
        except RunFailedError as error:
            failed[job.run.name] = f'{job.name}: {error}'
    return list(failed.values())


def run_jobs(jobs: Sequence[Job], study: Study, number: int) -> list[str]:
    """Train and test what is not finished.

    Args:
        jobs (Sequence[Job]): The runs; those that others start from come
            first.
        study (Study): The study.
        number (int): Runs at a time.

    Returns:
        list[str]: A message for each run that failed.

    Raises:
        StoppedError: If a signal stopped it.
    """
    chains, chain_of = [], {}
    for job in jobs:
        if job.run.start:
            chain = chain_of[job.run.start, job.seed]
        else:
            chains.append(chain := [])
        chain.append(job)
        chain_of[job.run.name, job.seed] = chain
    children = Children()
    children.listen()
    with ThreadPoolExecutor(number) as pool:
        parts = [
            pool.submit(run_chain, chain, study, children) for chain in chains
        ]
        # Python would not hear a signal that arrives just before an endless
        # wait.
        while wait(parts, timeout=1).not_done:
            pass
        return [message for part in parts for message in part.result()]
