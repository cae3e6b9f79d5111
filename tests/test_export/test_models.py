"""Models rewritten for export, still in PyTorch, against the originals."""

import pytest
import torch

from lors_plugin.adamixer.sampling import AdaptiveSampling3D
from lors_plugin.export import DetectorForExport, compare, for_export
from lors_plugin.export.cases import detector_case, random_images
from lors_plugin.export.models import Normalize, order_of
from lors_plugin.export.sampling import KINDS, by_gather, by_grid_sample
from lors_plugin.ops import sampling_3d


@pytest.mark.parametrize('read', [by_gather, by_grid_sample])
def test_levels_are_read_as_by_the_operator(read):
    feat = torch.randn(2, 6, 5, 7)
    points = torch.rand(2, 4, 3, 8, 3) * torch.tensor([80.0, 60.0, 1.0]) - 12
    points[0, 0, 0, 0, :2] = 0.0
    points[0, 0, 0, 1, :2] = torch.tensor([56.0, 40.0])  # the far corner
    wanted = sampling_3d([feat], points, (8,), backend='reference')
    cells = points[..., :2] / 8 - 0.5
    found = read(feat, cells, torch.ones(points.shape[:-1]))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def named(outputs):
    names = DetectorForExport.outputs
    return dict(zip(names, (tensor.numpy() for tensor in outputs)))


@pytest.mark.parametrize(
    'kind, decoder, sampling',
    [
        ('adamixer', dict(), 'gather'),
        ('lors', dict(), 'grid_sample'),
        ('lors', dict(static_ranks=0, adaptive_ranks=0), 'gather'),
        ('lors', dict(adaptive_weights='private'), 'gather'),
        ('lors', dict(static_weights='private'), 'gather'),
        (
            'lors',
            dict(adaptive_weights='full', static_weights='full'),
            'gather',
        ),
    ],
)
@pytest.mark.parametrize('pixels', ['uint8', 'normalized'])
def test_detectors(tiny_detector, kind, decoder, sampling, pixels):
    model = tiny_detector(kind, decoder=decoder).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module = DetectorForExport(for_export(model, sampling), pixels).eval()
    images = [
        random_images(1, shape, seed)[0]
        for seed, shape in enumerate([(64, 96), (50, 70), (33, 96)])
    ]
    inputs, wanted = detector_case(model, images, pixels)
    with torch.no_grad():
        found = module(*inputs)
    assert compare(named(found), named(wanted)) < 1e-4
    assert found[2].dtype == torch.int64
    assert model.state_dict().keys() == before.keys()
    assert isinstance(model.decoder.stages[0].sampling, AdaptiveSampling3D)


def test_unknown_sampling_is_refused(tiny_detector):
    with pytest.raises(ValueError, match='sampling'):
        for_export(tiny_detector('lors'), 'bilinear')
    assert len(KINDS) == 2


class Preprocessor(torch.nn.Module):
    def __init__(self, to_rgb):
        super().__init__()
        self.to_rgb = to_rgb
        self.mean = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        self.std = torch.tensor([2.0, 4.0, 8.0]).view(3, 1, 1)


@pytest.mark.parametrize('to_rgb', [False, True])
def test_files_take_rgb_whatever_the_model_sees(to_rgb):
    preprocessor = Preprocessor(to_rgb)
    assert order_of(preprocessor) == ('RGB' if to_rgb else 'BGR')
    rgb = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    seen = torch.tensor([10.0, 20, 30] if to_rgb else [30.0, 20, 10])
    wanted = (seen - torch.tensor([1.0, 2, 3])) / torch.tensor([2.0, 4, 8])
    found = Normalize(preprocessor, 'uint8')(rgb)
    torch.testing.assert_close(found.flatten(), wanted)
    ready = torch.randn(1, 3, 2, 2)
    assert Normalize(preprocessor, 'normalized')(ready) is ready
    with pytest.raises(ValueError, match='input'):
        Normalize(preprocessor, 'bytes')
