"""Cases from public bug reports, each run as its README says.

The folder of the cases is no part of the repository. It is taken from the
environment variable ``LORS_PLUGIN_CASES``, or is ``../shared/cases`` beside
the checkout. The quick cases run in the ordinary suite, all of them by
``pytest -m cases``. What each of them checks has a test of ours too, which
needs no such folder.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(
    os.environ.get('LORS_PLUGIN_CASES', ROOT.parent / 'shared' / 'cases')
)
# Those of few seconds.
QUICK = ('tile_names', 'voc_size_text')
# The test that holds the same behaviour.
CASES = dict(
    bare_weights=(
        'test_tools/test_visualize_sampling.py'
        '::test_other_forms_of_the_same_weights'
    ),
    cfg_options='test_config_file.py::test_overridden_everywhere',
    class_order='test_engine/test_data_check.py::test_order_of_the_classes',
    classes_file='test_engine/test_data_check.py::test_a_file_of_class_names',
    concat_test=(
        'test_tools/test_tta.py::test_every_data_set_of_several_is_augmented'
    ),
    dynamic_layout=(
        'test_parameternet/test_dynamic_conv.py'
        '::test_channels_last_and_quantised_routing'
    ),
    exif_loader=(
        'test_tools/test_voc_to_coco.py'
        '::test_boxes_on_photos_with_an_orientation'
    ),
    foreign_weights=(
        'test_tools/test_visualize_sampling.py::test_foreign_files_are_refused'
    ),
    gray_models='test_tools/test_get_flops.py::test_gray_images',
    json_late=(
        'test_engine/test_coco_file.py::test_what_the_loader_cannot_read'
    ),
    json_silent='test_engine/test_coco_file.py::test_what_is_left_out',
    large_image=(
        'test_tools/test_dataset_converters.py::test_sizes_of_maps_and_scans'
    ),
    llama_balance=(
        'test_language/test_experts.py'
        '::test_accumulated_batches_weigh_the_balance_once'
    ),
    metric_ids='test_evaluation/test_coco_metric.py::test_any_ids',
    resume_batch=(
        'test_engine/test_resume.py::test_schedules_end_with_the_training'
    ),
    roboflow_root=(
        'test_engine/test_data_check.py::test_a_category_that_is_there_twice'
    ),
    same_names='test_tools/test_plots.py::test_images_of_the_same_name',
    tile_json=(
        'test_tools/test_dataset_converters.py'
        '::test_faults_of_annotations_are_named'
    ),
    tile_names=(
        'test_tools/test_dataset_converters.py'
        '::test_tiles_have_names_of_their_own'
    ),
    tile_pixels=(
        'test_tools/test_dataset_converters.py'
        '::test_tiles_hold_what_the_loader_shows'
    ),
    transformers5='test_doctor/test_doctor.py::test_transformers_5',
    unnamed_images=(
        'test_tools/test_data_errors.py::test_a_damaged_picture_is_named'
    ),
    untrusted_pickle=(
        'test_tools/test_crafted_files.py::test_pickles_of_all_formats'
    ),
    voc_encodings='test_tools/test_voc_to_coco.py::test_encodings',
    voc_size_text=(
        'test_tools/test_voc_to_coco.py'
        '::test_boxes_on_photos_with_an_orientation'
    ),
    yaml_names='test_tools/test_yolo_to_coco.py::test_names_in_yaml',
    yolo_encodings='test_tools/test_yolo_to_coco.py::test_encodings',
)


@pytest.mark.parametrize('name', CASES)
def test_behaviour_has_a_test_of_ours(name):
    path, _, function = CASES[name].partition('::')
    source = (ROOT / 'tests' / path).read_text(encoding='utf-8')
    assert f'\ndef {function}(' in source


def params():
    """Names of cases, marked; pyproject.toml leaves slow cases out."""
    for name in CASES:
        marks = [pytest.mark.cases]
        marks += [] if name in QUICK else [pytest.mark.slow]
        yield pytest.param(name, marks=marks, id=name)


@pytest.fixture(scope='module')
def folder():
    """Where the cases are."""
    if not (FOLDER / 'run.sh').is_file():
        pytest.skip(
            f'no cases in {FOLDER}; LORS_PLUGIN_CASES names another folder'
        )
    return FOLDER


def test_all_cases_are_known(folder):
    assert {path.parent.name for path in folder.glob('*/case.py')} == {*CASES}


@pytest.mark.parametrize('name', params())
def test_case(folder, quick_python, name):
    command = ['sh', str(folder / 'run.sh'), str(ROOT), quick_python, name]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    for line in done.stdout.splitlines():
        if line.startswith('SKIPPED'):
            pytest.skip(f'{name}: {line}')
    assert done.returncode == 0, done.stdout
    assert '\nok ' in done.stdout
