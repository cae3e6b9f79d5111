"""Files: run by ONNX Runtime at other numbers and sizes of images."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from lors_plugin.export import (
    ClassifierForExport,
    DetectorForExport,
    ExportError,
    check_file,
    export_file,
    for_export,
    takes_one_size,
    write_file,
)
from lors_plugin.export.cases import (
    classifier_case,
    detector_case,
    random_images,
)
from lors_plugin.testing import randomize

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

ROWS = [[[3, 16, 16, 0, 1]], [[5, 24, 16, 0.25, 2]]]
# Another process that knows nothing of PyTorch.
RUN = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
data = np.load(sys.argv[2])
assert 'torch' not in sys.modules
for case in range(int(data['cases'])):
    inputs = {
        entry.name: data[f'{case}.{entry.name}']
        for entry in session.get_inputs()
    }
    for name, found in zip(
        [entry.name for entry in session.get_outputs()],
        session.run(None, inputs),
    ):
        wanted = data[f'{case}.{name}']
        assert found.shape == wanted.shape, name
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-3)
"""


def parameternet(**options):
    return dict(
        type='lors_plugin.ParameterNet',
        arch=dict(width=1.0, rows=ROWS),
        **options,
    )


def swin(num_experts, **options):
    return dict(
        type='lors_plugin.DynamicSwinTransformer',
        num_experts=num_experts,
        arch=dict(embed_dims=12, depths=[2, 1], num_heads=[2, 2]),
        window_size=4,
        out_indices=(1,),
        **options,
    )


def classifier(backbone):
    import mmpretrain.models  # noqa: F401

    from lors_plugin.registry import MODELS

    config = dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=24),
        data_preprocessor=dict(
            mean=[123.0, 116.0, 103.0], std=[58.0, 57.0, 57.0], to_rgb=True
        ),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    for name, param in model.named_parameters():
        if name.endswith('routing.fc.weight'):
            param.data.normal_(0, 0.5)
    return model


def in_another_process(content, module, cases, tmp_path):
    write_file(content, tmp_path / 'a.onnx')
    data = dict(cases=len(cases))
    for number, case in enumerate(cases):
        names = (*module.inputs, *module.outputs)
        for name, tensor in zip(names, (*case[0], *case[1])):
            data[f'{number}.{name}'] = tensor.numpy()
    np.savez(tmp_path / 'data.npz', **data)
    command = [sys.executable, '-c', RUN, 'a.onnx', 'data.npz']
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('routing', ['softmax_mlp', 'sigmoid_linear'])
def test_parameternet_with_any_number_of_images(routing, tmp_path):
    model = classifier(parameternet(routing=routing))
    module = ClassifierForExport(for_export(model)).eval()

    def case(batch, shape):
        images = random_images(batch, shape, batch)
        return classifier_case(model, images, 'float', False)

    content = export_file(module, case(2, (32, 32))[0])
    cases = [case(1, (32, 32)), case(3, (45, 32)), case(5, (31, 64))]
    assert check_file(content, cases, 1e-4) < 1e-4
    in_another_process(content, module, cases, tmp_path)
    # The comparison sees another expert.
    weights = [p for n, p in model.named_parameters() if 'primary' in n]
    weights[0].data[0] *= 3
    with pytest.raises(ExportError, match='1 x 3 x 32 x 32: results differ'):
        check_file(content, [case(1, (32, 32))], 1e-3)


def lively(model):
    """Biases that windows differ by, and routing that images differ by."""
    for name, param in model.named_parameters():
        if 'bias_table' in name or 'routing.fc.weight' in name:
            param.data.normal_(0, 5)
        elif 'absolute_pos_embed' in name:
            param.data.normal_()
    return model


def swin_v2():
    options = swin(1)
    del options['num_experts']
    options.update(type='SwinTransformerV2', pretrained_window_sizes=[0, 0])
    options.update(window_size=[4, 4])
    options['arch']['extra_norm_every_n_blocks'] = 2
    return options


@pytest.mark.parametrize(
    'backbone, shape',
    [
        (swin(3), (52, 40)),
        (swin(3, pad_small_map=True), (9, 40)),
        (swin(1, img_size=32, use_abs_pos_embed=True), (33, 64)),
        (swin_v2(), (52, 41)),
    ],
    ids=['dynamic', 'small-maps', 'positions', 'v2'],
)
def test_swin_with_any_number_of_images_of_one_size(backbone, shape):
    model = lively(classifier(backbone))
    module = ClassifierForExport(for_export(model)).eval()
    assert takes_one_size(model)

    def case(batch):
        images = random_images(batch, shape, batch)
        return classifier_case(model, images, 'float', False)

    content = export_file(module, case(2)[0], dynamic_size=False)
    assert check_file(content, [case(1), case(3)], 1e-4) < 1e-4


def test_a_detector_with_swin(build, tiny_config):
    decoder = dict(num_stages=1, adaptive_groups=1)
    config = tiny_config('lors', decoder=decoder)
    config['backbone'] = dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=(2, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        window_size=4,
    )
    model = lively(randomize(build(config))).eval()
    module = DetectorForExport(for_export(model)).eval()

    def case(*shapes):
        images = [random_images(1, s, i)[0] for i, s in enumerate(shapes)]
        return detector_case(model, images, 'float')

    inputs = case((64, 96), (50, 90))[0]
    content = export_file(module, inputs, dynamic_size=False)
    cases = [case((64, 96)), case((64, 70), (60, 96), (50, 41))]
    assert check_file(content, cases, 1e-3) < 1e-3


def test_branches_are_merged():
    model = classifier(parameternet(conv='rep'))
    module = ClassifierForExport(for_export(model)).eval()
    images = random_images(2, (32, 32), 0)
    case = classifier_case(model, images, 'float', False)
    content = export_file(module, case[0])
    check_file(content, [case], 1e-4)
    nodes = onnx.load_from_string(content).graph.node
    kinds = [node.op_type for node in nodes]
    plain = classifier(parameternet(num_experts=1))
    convs = [m for m in plain.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kinds.count('Conv') == len(convs)


@pytest.mark.parametrize(
    ('kind', 'sampling'), [('lors', 'gather'), ('adamixer', 'grid_sample')]
)
def test_detectors_with_any_number_and_size_of_images(
    kind, sampling, tiny_detector, tmp_path
):
    decoder = dict(num_stages=2)
    if kind == 'lors':
        decoder['adaptive_groups'] = [1, 2]
    model = tiny_detector(kind, decoder=decoder).eval()
    rewritten = for_export(model, sampling=sampling)
    module = DetectorForExport(rewritten).eval()

    def case(*shapes):
        images = [random_images(1, s, i)[0] for i, s in enumerate(shapes)]
        return detector_case(model, images, 'float')

    content = export_file(
        module,
        case((64, 96), (50, 90))[0],
        metadata=dict(classes=['a', 'b']),
        sampling=sampling,
    )
    cases = [
        case((64, 96)),
        case((33, 70), (64, 96), (50, 41)),
        case((96, 64), (90, 33)),
    ]
    assert check_file(content, cases, 1e-4) < 1e-4
    if kind == 'lors':
        in_another_process(content, module, cases, tmp_path)
    loaded = onnx.load_from_string(content)
    samples = {node.op_type for node in loaded.graph.node}
    assert ('GridSample' in samples) == (sampling == 'grid_sample')
    entries = {p.key: p.value for p in loaded.metadata_props}
    assert entries.keys() == {'classes', 'checksum'}
    assert entries['classes'] == '["a", "b"]'


def test_old_opsets_are_refused(tiny_detector):
    module = DetectorForExport(for_export(tiny_detector('lors')))
    with pytest.raises(ExportError, match='at least 16'):
        export_file(module, (), opset=11)


def test_outputs_of_another_shape_or_kind():
    """Compared by the file's names; see ``reparam.compare`` for numbers."""
    model = classifier(parameternet(num_experts=1))
    module = ClassifierForExport(for_export(model)).eval()
    images = random_images(1, (32, 32), 0)
    inputs, wanted = classifier_case(model, images, 'float', False)
    content = export_file(module, inputs)
    for outputs in ((wanted[0][:, :2], wanted[1]), (wanted[0] * torch.nan,)):
        with pytest.raises(ExportError, match='differ from PyTorch by'):
            check_file(content, [(inputs, outputs)], 1e9)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'deep' / 'a.onnx'
    write_file(b'old', path)
    with pytest.raises(TypeError):
        write_file('no bytes', path)
    assert path.read_bytes() == b'old'
    assert [p.name for p in path.parent.iterdir()] == ['a.onnx']
