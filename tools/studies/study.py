"""Tables of trainings: a study of accuracy is data that run.py trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# For configs that save neither during a training nor the optimizer: a run that
# was killed goes on from its last epoch.
RESUMABLE = {
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.save_optimizer': True,
}


class StudyError(ValueError):
    """A mistake in the command, the study or the data."""


@dataclass(frozen=True)
class Run:
    """One training, repeated for every seed.

    Attributes:
        name (str): ``name`` or ``group/name``; the report has a table per
            group.
        config (str): Config, relative to the root of the repository.
        options (dict): Entries of the config to override. An item of a list
            may be named by its type: ``custom_hooks.RepAdapterHook.scale``.
        against (str, optional): Run that this one is compared with, seed by
            seed.
        start (str, optional): Run of the same seed whose last checkpoint
            this one loads; it stands earlier in the table.
        best (bool): Take the checkpoint that is best on the validation data
            instead of the last one. Defaults to False.
        test (bool): Run ``tools/test.py`` on that checkpoint. Defaults to
            False.
    """

    name: str
    config: str = ''
    options: Mapping[str, object] = field(default_factory=dict)
    against: str | None = None
    start: str | None = None
    best: bool = False
    test: bool = False

    @property
    def group(self) -> str:
        """str: The part of the name before the last slash, or ''."""
        return self.name.rpartition('/')[0]


@dataclass(frozen=True)
class Study:
    """Trainings to compare.

    Attributes:
        title (str): Of the report.
        page (str): Document that says how to get data and weights.
        runs (Sequence[Run]): The table.
        metrics (dict[str, tuple[str, float]]): Key and factor of each value
            to report, by its label: ``AP=('val/coco/bbox_mAP', 100)``.
            ``val/`` keys are those of the training's ``scalars.json``,
            ``test/`` keys those of the test. The first one that a group of
            runs has is plotted.
        seeds (Sequence[int]): Defaults to (0, 1, 2).
        digits (int): Digits after the point in tables. Defaults to 1.
        parts (dict[str, str]): Submodules to count the parameters of, by
            label.
        measure (Callable, optional): Function of the pickle that
            ``tools/test.py --out`` writes, for more ``test/`` keys.
        command (Callable, optional): Function of run, seed and ``quick`` that
            returns script and arguments of a training that has no config.
            The script takes ``--work-dir DIR`` and writes
            ``DIR/*/vis_data/scalars.json`` as MMEngine does.
        summary (Callable, optional): Function of what ``report.collect``
            returns, for a table of its own in front of the others.
    """

    title: str
    page: str
    runs: Sequence[Run]
    metrics: Mapping[str, tuple[str, float]]
    seeds: Sequence[int] = (0, 1, 2)
    digits: int = 1
    parts: Mapping[str, str] = field(default_factory=dict)
    measure: Callable[[Path], dict[str, float]] | None = None
    command: Callable[[Run, int, bool], list[str]] | None = None
    summary: Callable[[Mapping[str, dict]], str] | None = None

    def __post_init__(self) -> None:
        known = []
        for run in self.runs:
            if run.name in known:
                raise StudyError(f'two runs are named {run.name}')
            if run.start and run.start not in known:
                raise StudyError(
                    f'{run.name} starts from {run.start}, which is no '
                    'earlier run'
                )
            known.append(run.name)
        for run in self.runs:
            if run.against and run.against not in known:
                raise StudyError(
                    f'{run.name} is compared with {run.against}, which is no '
                    'run'
                )
