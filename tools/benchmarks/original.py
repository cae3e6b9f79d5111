"""The decoder computed the way the original programs do it.

Plain functions of this package's modules, with their weights, so that the
benchmarks compare two ways to compute the same numbers. They follow what is
known of the originals: every low-rank product is formed for every query and
joined to the shared matrix before the sum; norms, activations and sampled
levels are tensors of their own; ``W + B A`` is formed.

Shapes: ``B`` images, ``N`` queries, ``G`` groups, ``P`` sampled points,
``Q`` mixed points, ``C`` channels a group, ``K`` parameter groups, ``r``
rank, ``L`` levels.
"""

import math

import torch
import torch.nn.functional as F

from lors_plugin.adamixer.box_geometry import (
    box_position_encoding,
    box_sizes,
    decode_boxes,
    intersection_over_foreground,
    refine_boxes,
)


def sampling(feats, points, strides):
    """3D sampling, level by level.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, G C, H_l, W_l).
        points (Tensor): Shape (B, N, G, P, 3).
        strides (Sequence[int]): Pixels a cell of each level.

    Returns:
        Tensor: Shape (B, N, G, P, C).
    """
    with torch.autocast(points.device.type, enabled=False):
        batch, queries, groups, num_points, _ = points.shape
        scales = points.new_tensor([math.log2(stride) for stride in strides])
        distance = points[..., 2:] - scales
        weights = (-(distance**2) / 2).softmax(-1)  # (B, N, G, P, L)
        weights = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)
        places = points[..., :2].permute(0, 2, 1, 3, 4).flatten(0, 1)
        levels = []
        for level, (feat, stride) in enumerate(zip(feats, strides)):
            height, width = feat.shape[-2:]
            size = points.new_tensor([width * stride, height * stride])
            maps = feat.to(points.dtype).reshape(
                batch * groups, -1, height, width
            )  # (B G, C, H, W)
            sampled = F.grid_sample(
                maps,
                places / size * 2 - 1,
                padding_mode='zeros',
                align_corners=False,
            )  # (B G, C, N, P)
            levels.append(sampled * weights[..., level].unsqueeze(1))
        out = sum(levels).view(batch, groups, -1, queries, num_points)
    return out.permute(0, 3, 1, 4, 2)


def add_low_rank(shared, left, core, right):
    """Form the matrices of all queries: ``shared + sum_k left core right``.

    Args:
        shared (Tensor): Shape (B N, G, rows, cols).
        left (Tensor): Shape (G, K, rows, r).
        core (Tensor): Shape (B N, G, K, r, r).
        right (Tensor): Shape (G, K, r, cols).

    Returns:
        Tensor: Shape (B N, G, rows, cols).
    """
    private = left @ core @ right
    return torch.cat([shared.unsqueeze(2), private], dim=2).sum(dim=2)


def matrices(module, query, stage):
    """Generate the matrices of a stage.

    Args:
        module (nn.Module): ``AdaptiveMixing`` or ``LORSAdaptiveMixing``.
        query (Tensor): Shape (B, N, D).
        stage (int): Number of the stage.

    Returns:
        tuple[Tensor]: ``M`` (B N, G, C, C) and ``S`` (B N, G, Q, P).
    """
    shape = module.shape
    groups, width = shape.groups, shape.width
    query = query.flatten(0, 1)
    generated = module.generator(query).reshape(len(query), groups, -1)
    channel, spatial = generated.split(
        [width**2, shape.out_points * shape.in_points], dim=-1
    )
    channel = channel.reshape(-1, groups, width, width)
    spatial = spatial.reshape(-1, groups, shape.out_points, shape.in_points)
    if not hasattr(module, 'core_generators'):
        return channel, spatial
    cores = module.core_generators[stage](query)
    parts = (module.channel_part, module.spatial_part)
    full = []
    for shared, part, core in zip(
        (channel, spatial), parts, cores.chunk(2, dim=-1)
    ):
        num, rank = part.groups[stage], part.ranks[stage]
        if rank:
            core = core.reshape(-1, groups, num, rank, rank)
            shared = add_low_rank(
                shared, part.left[stage], core, part.right[stage]
            )
        full.append(shared)
    return tuple(full)


def mixing(module, x, query, stage):
    """Adaptive mixing and output projection of one stage.

    Args:
        module (nn.Module): ``PrivateMixing`` or ``LORSAdaptiveMixing``.
        x (Tensor): Sampled features, shape (B, N, G, P, C).
        query (Tensor): Shape (B, N, D).
        stage (int): Number of the stage.

    Returns:
        Tensor: Shape (B, N, D).
    """
    if not hasattr(module, 'generator'):
        module = module[stage]
    batch, queries, groups, num_points, width = x.shape
    channel, spatial = matrices(module, query, stage)
    x = x.reshape(batch * queries, groups, num_points, width)
    y = torch.matmul(x, channel)
    y = F.relu(F.layer_norm(y, y.shape[-2:]))
    z = torch.matmul(spatial, y)
    z = F.relu(F.layer_norm(z, z.shape[-2:]))
    z = z.reshape(batch, queries, -1)
    projection = module.out_proj
    if isinstance(projection, torch.nn.Linear):
        return projection(z)
    weight, bias = projection.weight, projection.bias[stage]
    if projection.up[stage].numel():
        weight = weight + projection.up[stage] @ projection.down[stage]
    return F.linear(z, weight, bias)


def sampling_points(module, content, xyzr):
    """Where a stage looks, shape (B, N, G, P, 3)."""
    offsets = module.offsets(content).to(xyzr.dtype)
    offsets = offsets.unflatten(-1, (module.num_groups, module.num_points, 3))
    boxes = xyzr[:, :, None, None]
    places = boxes[..., :2] + offsets[..., :2] * box_sizes(boxes)
    return torch.cat([places, boxes[..., 2:3] + offsets[..., 2:]], dim=-1)


def attention(module, query, overlap):
    """Self-attention with a bias, softmax as a tensor of its own.

    Args:
        module (nn.Module): ``BoxSelfAttention``.
        query (Tensor): Shape (B, N, D).
        overlap (Tensor): Shape (B, N, N).

    Returns:
        Tensor: Shape (B, N, D).
    """
    bias = module.overlap_scale[:, None, None]
    bias = bias * torch.log(overlap + 1e-7)[:, None]
    qkv = module.qkv(query).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    weights = (logits + bias).softmax(-1).to(v.dtype)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


def run_stage(stage, feats, content, xyzr, strides, mix):
    """One stage; arguments and results as ``AdaMixerStage.forward``."""
    content = content + box_position_encoding(xyzr, stage.embed_dims)
    overlap = intersection_over_foreground(xyzr)
    content = stage.attention_norm(
        content + attention(stage.attention, content, overlap)
    )
    points = sampling_points(stage.sampling, content, xyzr)
    sampled = sampling(feats, points, strides)
    content = stage.mixing_norm(content + mix(sampled, content))
    content = stage.ffn_norm(stage.ffn(content))
    scores = stage.fc_cls(stage.cls_branch(content))
    delta = stage.fc_reg(stage.reg_branch(content))
    return scores.to(xyzr.dtype), refine_boxes(xyzr, delta), content


def run_decoder(decoder, feats, content, xyzr):
    """All stages; arguments and results as ``AdaMixerDecoder.forward``."""
    outputs = []
    for index, stage in enumerate(decoder.stages):

        def mix(x, query, index=index):
            return mixing(decoder.mixing, x, query, index)

        scores, xyzr, content = run_stage(
            stage, feats, content, xyzr.detach(), decoder.strides, mix
        )
        outputs.append((scores, decode_boxes(xyzr), content))
    return tuple(torch.stack(values) for values in zip(*outputs))
