"""Ground truth and detections with ids that every evaluation understands.

COCO's evaluation takes the ids of files into arrays of float64, sorts them
and takes 0 for "no match"; ``faster-coco-eval`` takes them into 64 bits and
-1 for "no match". Files have ids that are negative, from UUIDs, texts, 0, or
there twice, and so an AP of 0 for perfect predictions. Positions have none of
that.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence

from mmdet.datasets.api_wrappers import COCO


class Annotations(COCO):
    """Annotations of a file that may lack ``area`` and ``iscrowd``.

    An id that is a text is one id here, not a list of characters.
    """

    def createIndex(self) -> None:
        """Fill in what may lack, and index."""
        for annotation in self.dataset.get('annotations') or ():
            annotation.setdefault('iscrowd', 0)
            if 'area' not in annotation and 'bbox' in annotation:
                _, _, width, height = annotation['bbox']
                annotation['area'] = width * height
        super().createIndex()

    def getAnnIds(self, imgIds=(), catIds=(), areaRng=(), iscrowd=None):
        """See :meth:`pycocotools.coco.COCO.getAnnIds`."""
        return super().getAnnIds(
            _listed(imgIds), _listed(catIds), areaRng, iscrowd
        )

    def loadCats(self, ids=()):
        """See :meth:`pycocotools.coco.COCO.loadCats`."""
        return super().loadCats(_listed(ids))


def _listed(ids):
    return [ids] if isinstance(ids, (int, float, str)) else ids


def labels_of(coco: COCO, category_ids: Sequence) -> dict:
    """Return the label of each category: that of the first of its name.

    Args:
        coco (COCO): The ground truth.
        category_ids (Sequence): Ids of the categories by label.

    Returns:
        dict: Label by category id. Categories of other names lack.
    """
    names = [coco.cats[key]['name'] for key in category_ids]
    return {
        category['id']: names.index(category['name'])
        for category in coco.dataset['categories']
        if category['name'] in names
    }


def by_position(coco: COCO, image_ids: Sequence, labels: Mapping) -> COCO:
    """Copy annotations with other ids.

    Images and annotations are numbered from 1, and the id of a category is
    its label. Annotations of other images are left out; those of other
    categories have an id that no category has.

    Args:
        coco (COCO): Ground truth or detections.
        image_ids (Sequence): The images.
        labels (Mapping): Label by category id, from 0 on.

    Returns:
        COCO: The copy; images and annotations are new dictionaries, what
        they hold is shared.
    """
    images = {key: number for number, key in enumerate(image_ids, 1)}
    other = max(labels.values(), default=-1) + 1
    annotations = [
        dict(
            annotation,
            image_id=images[annotation['image_id']],
            category_id=labels.get(annotation['category_id'], other),
        )
        for annotation in coco.dataset.get('annotations') or ()
        if annotation['image_id'] in images
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation['id'] = number
    copy = COCO()
    copy.dataset = dict(
        images=[dict(coco.imgs[key], id=n) for key, n in images.items()],
        categories=[dict(id=n, name=str(n)) for n in range(other)],
        annotations=annotations,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        copy.createIndex()
    return copy


class OfAll:
    """Mix-in of an evaluator that evaluates all that is in its data."""

    def evaluate(self) -> None:
        """Match detections and ground truth."""
        self.params.imgIds = self.cocoGt.getImgIds()
        self.params.catIds = self.cocoGt.getCatIds()
        super().evaluate()
