"""Goldens of sampling and mixing against the port."""

import torch
from torch import Tensor, nn

from lors_plugin.adamixer.lors_mixing import LORSAdaptiveMixing
from lors_plugin.adamixer.mixing import AdaptiveMixing
from lors_plugin.checkpoints import to_lors_plugin
from lors_plugin.checkpoints.key_map import KEY_MAPS, find_rule
from lors_plugin.ops import sampling_3d

from .golden import Errors, Golden, relative_error

_PREFIXES = {
    'adamixer': 'roi_head.bbox_head.0.sampling_n_mixing.adaptive_mixing.',
    'lors': 'roi_head.adaptive_mixing.',
}


def check_sampling(golden: Golden) -> Errors:
    """3D sampling: output and gradients of points and features."""
    number = int(golden.arrays['n_points'])
    points = golden.tensor('points').squeeze(2).unflatten(2, (-1, number))
    points = points.clone().requires_grad_()
    strides = golden.arrays['strides'].tolist()
    feats = [
        golden.tensor(f'feat{i}').requires_grad_() for i in range(len(strides))
    ]
    out = sampling_3d(feats, points, strides)
    out.backward(golden.tensor('upstream'))
    grad_points = points.grad.flatten(2, 3).unsqueeze(2)
    errors = dict(
        out=relative_error(out, golden.tensor('out')),
        grad_points=relative_error(grad_points, golden.tensor('grad_points')),
    )
    for i, feat in enumerate(feats):
        errors[f'grad_feat{i}'] = relative_error(
            feat.grad, golden.tensor(f'grad_feat{i}')
        )
    return errors


def _load_mixing(golden: Golden, source: str):
    """Mixing weights through the one conversion, without their prefix."""
    prefix = _PREFIXES[source]
    state = {prefix + k: v for k, v in golden.original_weights().items()}
    return to_lors_plugin(state, source)


def _grads(golden: Golden, source: str, prefix: str) -> dict[str, Tensor]:
    """Golden weight gradients, keyed as our weights."""
    state = {
        _PREFIXES[source] + k[len(prefix) :]: golden.tensor(k)
        for k in golden.arrays
        if k.startswith(prefix)
    }
    groups = golden.json('dims')['G']
    converted = {}
    for key, value in state.items():
        rule, new = find_rule(KEY_MAPS[source], key)
        converted[new] = (
            value.unflatten(0, (groups, -1)) if rule.stacked else value
        )
    return converted


def _compare_grads(
    errors: Errors, prefix: str, wanted: dict, params: dict
) -> None:
    for key, reference in wanted.items():
        grad = params[key].grad
        grad = torch.zeros_like(reference) if grad is None else grad
        errors[f'{prefix}{key}'] = relative_error(grad, reference)


def check_adamixer_mixing(golden: Golden) -> Errors:
    """AdaMixer's mixing: output (with residual) and all gradients."""
    dims = golden.json('dims')
    mixing = AdaptiveMixing(
        dims['query_dim'],
        dims['in_dim'],
        dims['G'],
        dims['P_in'],
        dims['P_out'],
    )
    state = _load_mixing(golden, 'adamixer')
    mixing.load_state_dict(
        {k[len('decoder.mixing.0.') :]: v for k, v in state.items()}
    )
    x = golden.tensor('x').requires_grad_()
    query = golden.tensor('query').requires_grad_()
    out = query + mixing(x, query)
    out.backward(golden.tensor('upstream'))
    errors = dict(
        out=relative_error(out, golden.tensor('out')),
        grad_x=relative_error(x.grad, golden.tensor('grad_x')),
        grad_query=relative_error(query.grad, golden.tensor('grad_query')),
    )
    params = {f'decoder.mixing.0.{k}': v for k, v in mixing.named_parameters()}
    _compare_grads(errors, 'grad ', _grads(golden, 'adamixer', 'g.'), params)
    return errors


def check_lors_mixing(golden: Golden) -> Errors:
    """LORS' mixing in every stage: output (with residual and norm) and all
    gradients."""
    dims = golden.json('dims')
    stages = len(dims['adaptive_ranks'])
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.mixing = LORSAdaptiveMixing(
        stages,
        dims['query_dim'],
        dims['in_dim'],
        dims['G'],
        dims['P_in'],
        dims['P_out'],
        dims['adaptive_ranks'],
        dims['adaptive_groups'],
        dims['static_ranks'],
    )
    model.decoder.stages = nn.ModuleList()
    for _ in range(stages):
        stage = nn.Module()
        stage.mixing_norm = nn.LayerNorm(dims['query_dim'])
        model.decoder.stages.append(stage)
    model.load_state_dict(_load_mixing(golden, 'lors'))

    errors = {}
    for index, stage in enumerate(model.decoder.stages):
        model.zero_grad()
        x = golden.tensor('x').clone().requires_grad_()
        query = golden.tensor('query').clone().requires_grad_()
        out = stage.mixing_norm(query + model.decoder.mixing(x, query, index))
        out.backward(golden.tensor('upstream'))
        name = f's{index}.'
        for entry, value in (
            ('out', out),
            ('grad_x', x.grad),
            ('grad_query', query.grad),
        ):
            errors[name + entry] = relative_error(
                value, golden.tensor(name + entry)
            )
        _compare_grads(
            errors,
            name + 'grad ',
            _grads(golden, 'lors', name + 'g.'),
            dict(model.named_parameters()),
        )
    return errors
