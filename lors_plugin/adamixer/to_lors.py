"""Fit LORS to the mixing of a trained AdaMixer.

The mixing of stage ``l`` of AdaMixer generates its matrices from the query
``q`` by a full linear layer, ``T_l [q; 1]``. LORS replaces these layers by a
shared one and a low-rank part per stage (LORS, section 3.4). The fit
minimises the squared error of the generated matrices over the queries that
stage ``l`` sees, whose second moments are all that it needs to know of them:

- given the low-rank parts, the shared generator is a least-squares solution;
- given the shared generator, the part of a stage is the best approximation of
  the rest by ``sum_k left_k E_k(q) right_k``, a Tucker decomposition of the
  tensor (rows, columns, D + 1) for each parameter group ``k`` (higher-order
  orthogonal iteration).

The two alternate. Of the output projections the shared weight is fitted to
the weights alone, and the low-rank parts to the projected features: they span
the principal components of what the shared weight leaves over.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from lors_plugin.lors import AdaptiveLowRankStack, LowRankLinearStack
from lors_plugin.utils import few

from .detector import AdaMixer
from .lors_mixing import LORSAdaptiveMixing
from .mixing import AdaptiveMixing

SWEEPS = 8
# Of the mean of its eigenvalues, added to a second moment: few images leave
# directions that no query had.
RIDGE = 1e-4


@dataclass
class StageStatistics:
    """Second moments of what the mixing of a stage reads.

    Attributes:
        queries (Tensor): Mean of ``[q; 1] [q; 1]^T``, shape (D + 1, D + 1),
            float64.
        mixed (Tensor, optional): Mean of the flattened mixed features, shape
            (G Q C, ), float64.
        residual (Tensor, optional): Covariance of ``(W_l - W) x`` over mixed
            features ``x``, where ``W`` is the shared projection, shape
            (D, D), float64.
        variance (float, optional): Of ``W_l x``, summed over channels.
    """

    queries: Tensor
    mixed: Optional[Tensor] = None
    residual: Optional[Tensor] = None
    variance: Optional[float] = None


@dataclass
class StageError:
    """Relative errors of a stage: root of squared error over variance.

    Attributes:
        channel (float): Of the channel matrices that queries generate.
        spatial (float): Of the spatial matrices.
        projection (float): Of the projected features; without images, of the
            weights of the projection.
    """

    channel: float
    spatial: float
    projection: float


@torch.no_grad()
def to_lors(
    source: AdaMixer,
    target: AdaMixer,
    batches: Iterable[dict] = (),
    num_images: int = 0,
) -> list[StageError]:
    """Give a LORS-AdaMixer the weights of a trained AdaMixer.

    Args:
        source (AdaMixer): Trained, with private mixing in every stage. It
            stays as it is.
        target (AdaMixer): With :class:`LORSAdaptiveMixing`, for which groups
            and points are those of ``source``; all else is the same.
        batches (Iterable[dict]): From a data loader, to record queries on.
        num_images (int): Images to record on. 0, the default, takes the
            second moments that the norm in front of the mixing implies, and
            counts all mixed features alike.

    Returns:
        list[StageError]: Of each stage.

    Raises:
        ValueError: If sizes differ, a weight form is not 'lors', or there is
            no image.
    """
    stages, mixing = list(source.decoder.mixing), target.decoder.mixing
    _check(stages, mixing)
    rest = {
        key: value
        for key, value in source.state_dict().items()
        if not key.startswith('decoder.mixing.')
    }
    known = {
        key: value.shape
        for key, value in target.state_dict().items()
        if not key.startswith('decoder.mixing.')
    }
    found = {key: value.shape for key, value in rest.items()}
    odd = [key for key in (known | found) if known.get(key) != found.get(key)]
    if odd:
        raise ValueError(
            'besides the mixing, the two models differ in '
            f'{len(odd)} weights: {few(odd)}'
        )
    target.load_state_dict(rest, strict=False)
    mixing.out_proj.weight.copy_(
        _shared_projection(stages, [len(d) for d in mixing.out_proj.down])
    )
    if num_images:
        statistics = _record(source, mixing.out_proj, batches, num_images)
    else:
        norms = [stage.attention_norm for stage in source.decoder.stages]
        statistics = [_expected(norm) for norm in norms]
    return _fit_mixing(stages, mixing, statistics)


def _expected(norm: nn.LayerNorm) -> StageStatistics:
    """Return second moments as the norm in front of the mixing implies them.

    Queries are its outputs: of mean ``bias`` and, if the normalised values
    of the channels are uncorrelated, of covariance ``diag(weight^2)``.
    """
    mean = torch.cat([norm.bias.double(), norm.bias.new_ones(1).double()])
    moment = torch.outer(mean, mean)
    moment.diagonal()[:-1] += norm.weight.double() ** 2
    return StageStatistics(moment)


def _record(
    model: AdaMixer,
    shared: LowRankLinearStack,
    batches: Iterable[dict],
    num_images: int,
) -> list[StageStatistics]:
    """Record what the mixing of every stage reads on real images."""
    stages = list(model.decoder.mixing)
    sums = [_Sums(stage, shared.weight) for stage in stages]
    handles = [
        handle
        for stage, total in zip(stages, sums)
        for handle in (
            stage.generator.register_forward_pre_hook(total.add_queries),
            stage.out_proj.register_forward_hook(total.add_mixed),
        )
    ]
    training, seen = model.training, 0
    model.eval()
    try:
        for batch in batches:
            data = model.data_preprocessor(batch, False)
            model(**data, mode='tensor')
            seen += len(data['inputs'])
            if seen >= num_images:
                break
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not seen:
        raise ValueError('there are no images to record queries on')
    return [total.statistics() for total in sums]


class _Sums:
    """Sums over the inputs of a stage's generator and output projection."""

    def __init__(self, stage: AdaptiveMixing, shared: Tensor) -> None:
        self.rest = stage.out_proj.weight - shared
        self.count = 0
        self.queries = self.mixed = self.residual = 0.0
        self.out = self.squares = 0.0

    def add_queries(self, layer: nn.Module, args: tuple) -> None:
        query = args[0].flatten(0, -2).double()
        query = torch.cat([query, query.new_ones(len(query), 1)], 1)
        self.count += len(query)
        self.queries = self.queries + query.T @ query

    def add_mixed(self, layer: nn.Module, args: tuple, out: Tensor) -> None:
        mixed = args[0].flatten(0, -2)
        rest = (mixed @ self.rest.T).double()
        out = out.flatten(0, -2).double()
        self.mixed = self.mixed + mixed.sum(0, dtype=torch.float64)
        self.residual = self.residual + rest.T @ rest
        self.out = self.out + out.sum(0)
        self.squares = self.squares + out.square().sum()

    def statistics(self) -> StageStatistics:
        mixed = self.mixed / self.count
        mean = self.rest.double() @ mixed
        covariance = self.residual / self.count - torch.outer(mean, mean)
        square = (self.out / self.count).square().sum()
        return StageStatistics(
            self.queries / self.count,
            mixed,
            covariance,
            float(self.squares / self.count - square),
        )


def _fit_mixing(
    stages: Sequence[AdaptiveMixing],
    target: LORSAdaptiveMixing,
    statistics: Sequence[StageStatistics],
) -> list[StageError]:
    """Fit all but the shared projection, which is there; return errors."""
    shape = target.shape
    full = [
        torch.cat([s.generator.weight, s.generator.bias[:, None]], 1)
        .double()
        .unflatten(0, (shape.groups, -1))
        for s in stages
    ]
    moments = [s.queries for s in statistics]
    cut = shape.width**2
    shared, errors, cores = [], [], []
    for part, rows, chosen in (
        (target.channel_part, shape.width, slice(None, cut)),
        (target.spatial_part, shape.out_points, slice(cut, None)),
    ):
        tensors = [w[:, chosen].unflatten(1, (rows, -1)) for w in full]
        fit = _fit_generated(tensors, moments, part)
        shared.append(fit.shared.flatten(1, 2))
        cores.append(fit.cores)
        errors.append(fit.errors)
    generator = torch.cat(shared, 1).flatten(0, 1)
    _write(target.generator, generator)
    for linear, *parts in zip(target.core_generators, *cores):
        if linear.out_features:
            _write(linear, torch.cat([p.flatten(0, -2) for p in parts]))
    errors.append(_fit_projection(stages, target.out_proj, statistics))
    return [StageError(*values) for values in zip(*errors)]


def _check(
    stages: Sequence[AdaptiveMixing], target: LORSAdaptiveMixing
) -> None:
    if not isinstance(target.generator, nn.Linear) or not isinstance(
        target.out_proj, LowRankLinearStack
    ):
        raise ValueError(
            'adaptive_weights and static_weights of the decoder must be '
            "'lors': only shared weights with low-rank parts are fitted"
        )
    if target.out_proj.weight is None:
        raise ValueError(
            "static_weights='private' has no shared weight to fit; use 'lors'"
        )
    if len(stages) != len(target.core_generators):
        raise ValueError(
            f'num_stages={len(target.core_generators)}, but the checkpoint '
            f'has {len(stages)} stages'
        )
    names = 'groups', 'width', 'in_points', 'out_points'
    wanted = {name: getattr(target.shape, name) for name in names}
    for number, stage in enumerate(stages):
        found = {name: getattr(stage.shape, name) for name in names}
        if found != wanted:
            raise ValueError(
                f'stage {number} of the checkpoint has {found}, the config '
                f'{wanted}: set num_groups, in_points and out_points of the '
                'decoder to those of the checkpoint'
            )


def _regular(moment: Tensor) -> Tensor:
    ridge = RIDGE * moment.diagonal()[:-1].mean()
    moment = moment.clone()
    moment.diagonal()[:-1] += ridge
    # Of few queries, [q; 1] may depend linearly on itself.
    moment[-1, -1] *= 1 + RIDGE
    return moment


@dataclass
class _Generated:
    shared: Tensor  # (G, rows, columns, D + 1)
    cores: list[Tensor]  # of each stage (G, K, r, r, D + 1)
    errors: list[float]


def _fit_generated(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    part: AdaptiveLowRankStack,
) -> _Generated:
    """Fit matrices of shape (rows, columns) that queries generate.

    Args:
        weights (Sequence[Tensor]): Of each stage, shape (G, rows, columns,
            D + 1), the bias last.
        moments (Sequence[Tensor]): Of each stage's queries.
        part (AdaptiveLowRankStack): Gets the static factors.
    """
    # With E [q; 1] [q; 1]^T = F F^T, errors over queries are Frobenius norms
    # of tensors times F.
    regular = [_regular(moment) for moment in moments]
    factors = [torch.linalg.cholesky(moment) for moment in regular]
    total = torch.linalg.cholesky(torch.stack(regular).sum(0))
    lowered = [torch.zeros_like(w) for w in weights]
    terms: list = [None] * len(weights)
    for _ in range(SWEEPS):
        right = sum(
            (w - low) @ moment
            for w, low, moment in zip(weights, lowered, regular)
        )
        solved = torch.cholesky_solve(right.flatten(0, 2).T, total)
        shared = solved.T.reshape(right.shape)
        for i, (weight, factor) in enumerate(zip(weights, factors)):
            rank, num = part.ranks[i], part.groups[i]
            rest = (weight - shared) @ factor
            terms[i] = _fit_terms(rest, rank, num, terms[i])
            lowered[i] = _times_inverse(_sum_terms(terms[i], rest), factor)
    cores, errors = [], []
    for i, (weight, moment) in enumerate(zip(weights, moments)):
        left, core, right = terms[i]
        part.left[i].copy_(left)
        part.right[i].copy_(right)
        cores.append(_times_inverse(core, factors[i]))
        lost = _mean_square(weight - shared - lowered[i], moment)
        mean = moment[-1]
        whole = _mean_square(weight, moment - torch.outer(mean, mean))
        errors.append((max(lost, 0.0) / max(whole, 1e-300)) ** 0.5)
    return _Generated(shared, cores, errors)


def _mean_square(tensor: Tensor, moment: Tensor) -> float:
    """Mean over queries of the squared norm of what a tensor generates."""
    return ((tensor @ moment) * tensor).sum().item()


def _times_inverse(tensor: Tensor, factor: Tensor) -> Tensor:
    """Solve ``X factor = tensor`` along the last dimension."""
    rows = tensor.flatten(0, -2)
    solved = torch.linalg.solve_triangular(
        factor, rows, upper=False, left=False
    )
    return solved.view(tensor.shape)


Terms = tuple[Tensor, Tensor, Tensor]


def _sum_terms(terms: Terms, like: Tensor) -> Tensor:
    left, core, right = terms
    if not core.numel():
        return torch.zeros_like(like)
    return torch.einsum('gkar,gkrsd,gksb->gabd', left, core, right)


def _fit_terms(
    rest: Tensor, rank: int, num: int, start: Optional[Terms]
) -> Terms:
    """Approximate tensors by ``num`` Tucker terms of ranks (rank, rank).

    Args:
        rest (Tensor): Shape (G, rows, columns, D + 1).
        rank (int): Of a term, at most the number of rows or columns that
            count.
        num (int): Number of terms, fitted in turns.
        start (tuple, optional): Terms to start from. Defaults to none.

    Returns:
        tuple[Tensor]: Left factors (G, K, rows, r), cores (G, K, r, r,
        D + 1) and right factors (G, K, r, columns).
    """
    groups, rows, columns, depth = rest.shape
    if start is None:
        start = (
            rest.new_zeros(groups, num, rows, rank),
            rest.new_zeros(groups, num, rank, rank, depth),
            rest.new_zeros(groups, num, rank, columns),
        )
    left, core, right = start
    if not rank:
        return start
    left_over = rest - _sum_terms(start, rest)
    for k in range(num):
        term = left[:, k : k + 1], core[:, k : k + 1], right[:, k : k + 1]
        goal = left_over + _sum_terms(term, rest)
        u, v = left[:, k], right[:, k].mT
        if not v.any():
            v = _principal(goal.transpose(1, 2).flatten(2), rank)
        for _ in range(2):
            u = _principal(
                torch.einsum('gabd,gbs->gasd', goal, v).flatten(2), rank
            )
            v = _principal(
                torch.einsum('gabd,gar->gbrd', goal, u).flatten(2), rank
            )
        left[:, k], right[:, k] = u, v.mT
        core[:, k] = torch.einsum('gabd,gar,gbs->grsd', goal, u, v)
        term = left[:, k : k + 1], core[:, k : k + 1], right[:, k : k + 1]
        left_over = goal - _sum_terms(term, rest)
    return left, core, right


def _principal(matrices: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors, zero columns beyond the full rank.

    Shape (G, rows, any) to (G, rows, rank).
    """
    vectors = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(-1)
    vectors = vectors[..., :rank]
    return nn.functional.pad(vectors, (0, rank - vectors.shape[-1]))


def _shared_projection(
    stages: Sequence[AdaptiveMixing], ranks: Sequence[int]
) -> Tensor:
    """Fit ``W`` of ``W + B_l A_l`` to the output projections, unweighted."""
    full = torch.stack([s.out_proj.weight.double() for s in stages])
    shared = full.mean(0)
    for _ in range(SWEEPS):
        lowered = []
        for weight, rank in zip(full, ranks):
            rest = weight - shared
            up = _principal(rest[None], rank)[0]
            lowered.append(weight - up @ (up.T @ rest))
        shared = torch.stack(lowered).mean(0)
    return shared


def _fit_projection(
    stages: Sequence[AdaptiveMixing],
    target: LowRankLinearStack,
    statistics: Sequence[StageStatistics],
) -> list[float]:
    """Fit the private parts of the projection; return relative errors."""
    errors = []
    for i, (stage, known) in enumerate(zip(stages, statistics)):
        weight = stage.out_proj.weight.double()
        rest, rank = weight - target.weight.double(), len(target.down[i])
        covariance, whole = known.residual, known.variance
        if covariance is None:
            covariance, whole = rest @ rest.T, float(weight.square().sum())
        # Projected features lie closest to their principal components.
        up = _principal(covariance[None], rank)[0]
        down = up.T @ rest
        bias = stage.out_proj.bias.double()
        if known.mixed is not None:
            bias = bias + (rest - up @ down) @ known.mixed
        target.up[i].copy_(up)
        target.down[i].copy_(down)
        target.bias[i].copy_(bias)
        lost = covariance.trace() - (up.T @ covariance @ up).trace()
        errors.append((max(float(lost), 0.0) / max(whole, 1e-300)) ** 0.5)
    return errors


def _write(linear: nn.Linear, weight_and_bias: Tensor) -> None:
    linear.weight.copy_(weight_and_bias[:, :-1])
    linear.bias.copy_(weight_and_bias[:, -1])
