"""Decoder and dynamic convolution as the original programs compute them.

Functions of this package's modules that take nothing but their weights, so
that a benchmark compares two formulations of the same result. They follow
what is known of the original programs: every low-rank product is formed for
every query and joined to the shared matrix before the sum; norms, activations
and sampled levels are tensors of their own; ``W + B A`` is formed; the
kernels of all images are mixed at once for one grouped convolution.

Shapes: ``B`` images, ``N`` queries, ``G`` groups, ``P`` sampled points per
group, ``Q`` mixed points per group, ``C`` channels per group, ``K`` parameter
groups, ``r`` rank, ``L`` levels, ``M`` experts.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from lors_plugin.models import DynamicConv2d

# --- boxes (x, y, z, r): centre, log2 of the scale, log2 of height / width


def box_sizes(boxes):
    """Width and height, shape (..., 2)."""
    _, _, z, r = boxes.unbind(-1)
    return torch.stack([2 ** (z - r / 2), 2 ** (z + r / 2)], dim=-1)


def corners(boxes):
    """(x1, y1, x2, y2), shape (..., 4)."""
    half = 0.5 * box_sizes(boxes)
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def overlaps(boxes):
    """Intersection over the area of the first box, shape (B, N, N)."""
    x1, y1, x2, y2 = corners(boxes).unbind(-1)
    width = torch.minimum(x2[:, :, None], x2[:, None])
    width = width - torch.maximum(x1[:, :, None], x1[:, None])
    height = torch.minimum(y2[:, :, None], y2[:, None])
    height = height - torch.maximum(y1[:, :, None], y1[:, None])
    area = ((x2 - x1) * (y2 - y1)).clamp(min=1e-6)
    return width.clamp(min=0) * height.clamp(min=0) / area[:, :, None]


def position_encoding(boxes, width):
    """Sines and cosines in turns, shape (B, N, width)."""
    boxes = boxes / boxes.new_tensor([1000, 1000, 1, 1])
    number = width // 4
    index = torch.arange(number, device=boxes.device) // 2
    angles = boxes.unsqueeze(-1) / 10000 ** (2 * index / number)
    code = torch.empty_like(angles)
    code[..., 0::2] = angles[..., 0::2].sin()
    code[..., 1::2] = angles[..., 1::2].cos()
    return code.flatten(-2)


def refine(boxes, delta):
    """Move the centre in units of the scale, add to scale and aspect."""
    delta = delta.to(boxes.dtype)
    centre = boxes[..., :2] + delta[..., :2] * 2 ** boxes[..., 2:3]
    return torch.cat([centre, boxes[..., 2:] + delta[..., 2:]], dim=-1)


# --- the decoder


def sampling(feats, points, strides):
    """3D sampling, level by level.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, G C, H_l, W_l).
        points (Tensor): Shape (B, N, G, P, 3).
        strides (Sequence[int]): Pixels per cell of each level.

    Returns:
        Tensor: Shape (B, N, G, P, C).
    """
    with torch.autocast(points.device.type, enabled=False):
        batch, queries, groups, num_points, _ = points.shape
        scales = points.new_tensor([math.log2(stride) for stride in strides])
        distance = points[..., 2:] - scales
        weights = (-(distance**2) / 2).softmax(-1)  # (B, N, G, P, L)
        weights = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)
        positions = points[..., :2].permute(0, 2, 1, 3, 4).flatten(0, 1)
        levels = []
        for level, (feat, stride) in enumerate(zip(feats, strides)):
            height, width = feat.shape[-2:]
            size = points.new_tensor([width * stride, height * stride])
            maps = feat.to(points.dtype).reshape(
                batch * groups, -1, height, width
            )  # (B G, C, H, W)
            sampled = F.grid_sample(
                maps,
                positions / size * 2 - 1,
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
    """Points that a stage samples, shape (B, N, G, P, 3)."""
    offsets = module.offsets(content).to(xyzr.dtype)
    offsets = offsets.unflatten(-1, (module.num_groups, module.num_points, 3))
    boxes = xyzr[:, :, None, None]
    positions = boxes[..., :2] + offsets[..., :2] * box_sizes(boxes)
    return torch.cat([positions, boxes[..., 2:3] + offsets[..., 2:]], dim=-1)


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
    content = content + position_encoding(xyzr, stage.embed_dims)
    overlap = overlaps(xyzr)
    content = stage.attention_norm(
        content + attention(stage.attention, content, overlap)
    )
    points = sampling_points(stage.sampling, content, xyzr)
    sampled = sampling(feats, points, strides)
    content = stage.mixing_norm(content + mix(sampled, content))
    content = stage.ffn_norm(stage.ffn(content))
    scores = stage.fc_cls(stage.cls_branch(content))
    delta = stage.fc_reg(stage.reg_branch(content))
    return scores.to(xyzr.dtype), refine(xyzr, delta), content


def run_decoder(decoder, feats, content, xyzr):
    """All stages; arguments and results as ``AdaMixerDecoder.forward``."""
    outputs = []
    for index, stage in enumerate(decoder.stages):

        def mix(x, query, index=index):
            return mixing(decoder.mixing, x, query, index)

        scores, xyzr, content = run_stage(
            stage, feats, content, xyzr.detach(), decoder.strides, mix
        )
        outputs.append((scores, corners(xyzr), content))
    return tuple(torch.stack(values) for values in zip(*outputs))


@contextlib.contextmanager
def as_original(decoder):
    """Replace the forward pass of a decoder for a while."""
    decoder.forward = lambda *inputs: run_decoder(decoder, *inputs)
    try:
        yield
    finally:
        del decoder.forward


# --- dynamic convolution


def attend(router, pooled):
    """Weights of the experts, shape (B, M)."""
    if router.routing == 'sigmoid_linear':
        return torch.sigmoid(router.fc(pooled) / router.temperature)
    logits = router.fc(F.relu(router.hidden(pooled)))
    return F.softmax(logits / router.temperature, dim=-1)


def convolution(module, x):
    """Convolve each image with its own mixture of kernels.

    Args:
        module (DynamicConv2d): Whose weights to take.
        x (Tensor): Shape (B, C_in, H, W).

    Returns:
        Tensor: Shape (B, C_out, H_out, W_out).
    """
    batch, channels, height, width = x.shape
    experts, rows, *size = module.weight.shape
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    attention = attend(module.routing, pooled)
    kernels = torch.matmul(attention, module.weight.view(experts, -1))
    bias = module.bias
    if bias is not None:
        bias = torch.matmul(attention, bias).flatten()
    out = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        kernels.view(batch * rows, *size),
        bias,
        module.stride,
        module.padding,
        module.dilation,
        groups=module.groups * batch,
    )
    return out.view(batch, rows, *out.shape[-2:])


@contextlib.contextmanager
def original_convolutions():
    """Replace the forward pass of all dynamic convolutions for a while."""
    forward = DynamicConv2d.forward
    DynamicConv2d.forward = convolution
    try:
        yield
    finally:
        DynamicConv2d.forward = forward
