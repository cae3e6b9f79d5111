"""Models rewritten for export, still in PyTorch, against the originals."""

import pytest
import torch

from lors_plugin.export import DetectorForExport, for_export
from lors_plugin.export.cases import detector_case, random_images
from lors_plugin.export.models import Normalize, order_of
from lors_plugin.reparam.compare import detections_difference


def per_image(outputs):
    return [
        dict(zip(DetectorForExport.outputs, image)) for image in zip(*outputs)
    ]


@pytest.mark.parametrize(
    'kind, decoder',
    [
        ('adamixer', dict()),
        ('lors', dict()),
        ('lors', dict(static_ranks=0, adaptive_ranks=0)),
        ('lors', dict(adaptive_weights='private', static_weights='private')),
        ('lors', dict(adaptive_weights='full', static_weights='full')),
    ],
)
@pytest.mark.parametrize('pixels', ['uint8', 'normalized'])
def test_detectors(tiny_detector, kind, decoder, pixels):
    model = tiny_detector(kind, decoder=decoder).eval()
    backend = model.decoder.stages[0].sampling.backend
    trained = [p.requires_grad for p in model.parameters()]
    module = DetectorForExport(for_export(model), pixels).eval()
    images = [
        random_images(1, shape, seed)[0]
        for seed, shape in enumerate([(64, 96), (50, 70), (33, 96)])
    ]
    inputs, wanted = detector_case(model, images, pixels)
    with torch.no_grad():
        found = module(*inputs)
    pair = per_image(wanted), per_image(found)
    assert detections_difference(*pair).within(1e-4)
    assert found[2].dtype == torch.int64
    # The model itself runs as before.
    assert model.decoder.stages[0].sampling.backend == backend
    assert [p.requires_grad for p in model.parameters()] == trained
    assert any(trained) and not any(
        p.requires_grad for p in module.parameters()
    )


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
