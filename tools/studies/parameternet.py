"""GhostNet, ParameterNet and RepConv: what does pretraining bring?

Each network learns a large set (Fashion-MNIST), then a small one (solar cells,
ELPV) from scratch, and the small one again from the weights of the large one.
"""

from pathlib import Path

import torch
from scipy.stats import mannwhitneyu
from study import Run, Study

from lors_plugin.checkpoints import load_pickle_file

CONFIG = 'configs/parameternet/parameternet-tiny_{}.py'
MODELS = {
    'ghostnet': dict(num_experts=1),
    'repconv': dict(conv='rep'),
    **{
        f'parameternet-{experts}-{name}': dict(
            num_experts=experts, routing=routing
        )
        for name, routing in dict(
            sigmoid='sigmoid_linear', softmax='softmax_mlp'
        ).items()
        for experts in (2, 4, 8)
    },
}
# 40,000 images, once; a tenth of the steps is warm-up.
LARGE = {
    'train_dataloader.dataset.indices': 40000,
    'train_cfg.max_epochs': 1,
    'param_scheduler.0.end': 62,
    'param_scheduler.1.end': 1,
}


def area_under_curve(predictions: Path) -> dict[str, float]:
    """Compute the area under the ROC curve of two classes, in percent.

    Args:
        predictions (Path): What ``tools/test.py --out`` wrote.

    Returns:
        dict[str, float]: ``auc``: how often a positive image scores higher
        than a negative one; ties count half.
    """
    samples = load_pickle_file(predictions)
    scores = torch.stack([sample['pred_score'] for sample in samples])
    labels = torch.cat([sample['gt_label'] for sample in samples])
    positive, negative = (
        scores[labels == label, 1].numpy() for label in (1, 0)
    )
    wins = mannwhitneyu(positive, negative).statistic
    return dict(auc=100 * float(wins) / (len(positive) * len(negative)))


def runs_of(name: str, backbone: dict) -> list[Run]:
    """Describe the three trainings of a network."""
    model = {f'model.backbone.{key}': v for key, v in backbone.items()}
    small = CONFIG.format('elpv')
    large, scratch = f'large/{name}', f'scratch/{name}'
    return [
        Run(large, CONFIG.format('fashion-mnist'), {**LARGE, **model}),
        Run(scratch, small, model, test=True),
        Run(f'pretrained/{name}', small, model, scratch, large, test=True),
    ]


STUDY = Study(
    title='ParameterNet in small: what does a larger set bring?',
    page='docs/en/benchmarks/parameternet_evidence.md',
    runs=[
        run
        for name, backbone in MODELS.items()
        for run in runs_of(name, backbone)
    ],
    metrics={
        'AUC': ('test/auc', 1),
        'test accuracy': ('test/accuracy/top1', 1),
        'validation accuracy': ('val/accuracy/top1', 1),
        'largest share (%)': ('val/expert_usage/top', 100),
        'entropy (%)': ('val/expert_usage/entropy', 100),
        'variation (%)': ('val/expert_usage/variation', 100),
    },
    digits=2,
    measure=area_under_curve,
)
