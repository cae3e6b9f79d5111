"""Every row of the papers' tables is a model that can be trained."""

import pytest
import recipe
import run as run_study
from mmengine.config import Config

from lors_plugin.analysis.weightless import EmptyWeights
from lors_plugin.registry import MODELS

SCALES = ['0.1', '0.5', '1', '5', '10']


def decoders(config, study):
    """Decoders of all runs; queries are built too."""
    plain = Config.fromfile(config)
    for run in study.runs:
        words = [f'{k}={v}'.replace(' ', '') for k, v in run.options.items()]
        config = Config(plain.to_dict())
        config.merge_from_dict(recipe.parse_options(words))
        with EmptyWeights():
            MODELS.build(config.model.query_generator)
            yield run.name, MODELS.build(config.model.decoder)


@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_all_rows_build(root, kind):
    study = run_study.load_study(f'{kind}_tables')
    sizes = {
        name: sum(p.numel() for p in decoder.parameters())
        for name, decoder in decoders(root / study.runs[0].config, study)
    }
    # No option is without effect, but for those that move no weight.
    same = {k for k, v in sizes.items() if v == sizes[study.runs[0].name]}
    assert same <= {
        'mixing/channel-spatial', 'mixing/spatial-channel', 'boxes/learned',
        'positions/no-encoding', 'positions/encoding-query-key',
        'parts/both', 'stages/6', 'adaptive/K2-r16', 'static/K1-r8',
        'static/K2-r4',
    }  # fmt: skip


def test_lors_of_no_part_is_adamixer(root):
    lors = dict(
        decoders(
            root / run_study.load_study('lors_tables').runs[0].config,
            run_study.load_study('lors_tables'),
        )
    )['parts/none']
    fair = Config.fromfile(
        root / 'configs/adamixer/adamixer_r50-g2-p64_8xb2-1x_coco.py'
    )
    with EmptyWeights():
        fair = MODELS.build(fair.model.decoder)
    count = [sum(p.numel() for p in m.parameters()) for m in (lors, fair)]
    assert count[0] == count[1]


def test_vtab_has_its_tasks_and_means():
    study = run_study.load_study('vtab')
    names = [run.name for run in study.runs]
    assert len(names) == 19 * 6
    # Test accuracy rises with the scale, validation falls.
    runs = {
        name: dict(
            summary=dict(
                test=dict(mean=50 + SCALES.index(name.rpartition('-s')[2])),
                validation=dict(
                    mean=90 - SCALES.index(name.rpartition('-s')[2])
                ),
            )
        )
        for name in names
        if not name.endswith('published')
    }
    for name in names:
        if name.endswith('published') and 'natural' in name:
            runs[name] = dict(summary=dict(test=dict(mean=70)))
    table = study.summary(runs).splitlines()
    assert table[2] == '| cifar | 0.1 | 50.0 | 0.1 | 70.0 |'
    assert table[9] == '| **natural** | | **50.0** | | **70.0** |'
    assert table[-1] == '| **mean of the groups** | | **50.0** | | - |'
    runs = {k: v for k, v in runs.items() if 'kitti-s5' not in k}
    table = study.summary(runs)
    assert '| kitti | - | - | 5 | - |' in table
    assert '| **structured** | | - | | - |' in table
    assert 'Not trained yet: kitti.' in table
