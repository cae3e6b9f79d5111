"""Triton: adaptive mixing forward on tensor cores.

One program mixes one group of one query from beginning to end, in registers
and shared memory. Names are those of flash-linear-attention: ``p_`` pointers,
``i_`` indices, ``o_`` offsets, ``m_`` masks, ``b_`` blocks.

The ``K`` parameter groups are taken side by side: ``left`` as one matrix of
``K r`` columns, ``right`` as one of ``K r`` rows, and the cores as the blocks
on the diagonal of one square matrix between them. ``BP``, ``BC``, ``BQ`` and
``BKR`` are powers of two of at least 16 above ``P``, ``C``, ``Q`` and
``K r``; whatever is beyond the true size is zero.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(p, rows, cols, stride, m, DOT: tl.constexpr):
    """Load ``p[rows, cols]`` of a matrix whose rows are ``stride`` apart."""
    o = rows[:, None] * stride + cols[None, :]
    return tl.load(p + o, mask=m, other=0).to(DOT)


@triton.jit
def load_left(
    p,  # (rows, K r) of one group
    o_rows,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BKR: tl.constexpr,
    DOT: tl.constexpr,
):
    """Load rows of all left factors side by side, (len(o_rows), BKR)."""
    o_j = tl.arange(0, BKR)
    m = (o_rows < ROWS)[:, None] & (o_j < K * R)[None, :]
    return load_tile(p, o_rows, o_j, K * R, m, DOT)


@triton.jit
def load_right(
    p,  # (K, r, cols) of one group
    COLS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BKR: tl.constexpr,
    BCOLS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Load all right factors one below the other, (BKR, BCOLS)."""
    o_j = tl.arange(0, BKR)
    o_cols = tl.arange(0, BCOLS)
    m = (o_j < K * R)[:, None] & (o_cols < COLS)[None, :]
    return load_tile(p, o_j, o_cols, COLS, m, DOT)


@triton.jit
def load_cores(
    p,  # (K, r, r) of one query and group
    K: tl.constexpr,
    R: tl.constexpr,
    BKR: tl.constexpr,
    DOT: tl.constexpr,
):
    """Load the cores as blocks on the diagonal, (BKR, BKR)."""
    o_j = tl.arange(0, BKR)
    i_k = o_j // R
    m = (i_k[:, None] == i_k[None, :]) & (o_j < K * R)[:, None]
    o = (i_k * (R * R) + (o_j % R) * R)[:, None] + (o_j % R)[None, :]
    return tl.load(p + o, mask=m & (o_j < K * R)[None, :], other=0).to(DOT)


@triton.jit
def mix_channels(
    p_x,  # (P, C)
    p_m,  # (C, C)
    p_l,  # (C, K r)
    p_e,  # (K, r, r)
    p_r,  # (K, r, C)
    P: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BKR: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply ``x (M + L E R)``, the low-rank part kept in factors."""
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    m_p = o_p < P
    m_c = o_c < C
    b_y = tl.zeros((BP, BC), tl.float32)
    b_t = tl.zeros((BP, BKR), tl.float32)
    for i_c in range(0, C, BK):
        o_k = i_c + tl.arange(0, BK)
        m_k = o_k < C
        b_x = load_tile(p_x, o_p, o_k, C, m_p[:, None] & m_k[None, :], DOT)
        b_m = load_tile(p_m, o_k, o_c, C, m_k[:, None] & m_c[None, :], DOT)
        b_y = tl.dot(b_x, b_m, b_y, input_precision=PRECISION)
        if K > 0:
            b_l = load_left(p_l, o_k, C, K, R, BKR, DOT)
            b_t = tl.dot(b_x, b_l, b_t, input_precision=PRECISION)
    if K > 0:
        b_e = load_cores(p_e, K, R, BKR, DOT)
        b_u = tl.dot(b_t.to(DOT), b_e, input_precision=PRECISION).to(DOT)
        b_r = load_right(p_r, C, K, R, BKR, BC, DOT)
        b_y = tl.dot(b_u, b_r, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def core_right(
    p_e,  # (K, r, r)
    p_r,  # (K, r, P)
    P: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BKR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply ``F R`` of the spatial side, (BKR, BP)."""
    b_e = load_cores(p_e, K, R, BKR, DOT)
    b_r = load_right(p_r, P, K, R, BKR, BP, DOT)
    return tl.dot(b_e, b_r, input_precision=PRECISION).to(DOT)


@triton.jit
def spatial_tile(
    p_s,  # (Q, P)
    p_l,  # (Q, K r)
    b_fr,  # (BKR, BP)
    o_q,
    Q: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BKR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Form rows of ``S + L F R``: fewer products than keeping factors."""
    o_p = tl.arange(0, BP)
    m = (o_q < Q)[:, None] & (o_p < P)[None, :]
    b_s = load_tile(p_s, o_q, o_p, P, m, DOT)
    if K > 0:
        b_l = load_left(p_l, o_q, Q, K, R, BKR, DOT)
        b_low = tl.dot(b_l, b_fr, input_precision=PRECISION)
        b_s = (b_s.to(tl.float32) + b_low).to(DOT)
    return b_s


@triton.jit
def normalise(b, m, count, eps):
    """Layer norm over a whole masked tile; returns it, mean and rstd."""
    mean = tl.sum(tl.sum(b, 1), 0) / count
    b = tl.where(m, b - mean, 0.0)
    var = tl.sum(tl.sum(b * b, 1), 0) / count
    rstd = 1.0 / tl.sqrt(var + eps)
    return b * rstd, mean, rstd


@triton.jit
def adaptive_mixing_fwd_kernel(
    p_x,  # (B N G, P, C)
    p_w,  # (B N G, C C + Q P)
    p_cl,  # (G, C, KC RC)
    p_cc,  # (B N G, KC, RC, RC)
    p_cr,  # (G, KC, RC, C)
    p_sl,  # (G, Q, KS RS)
    p_sc,  # (B N G, KS, RS, RS)
    p_sr,  # (G, KS, RS, P)
    p_out,  # (B N G, Q, C)
    p_stats,  # (B N G, 4)
    G: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    KC: tl.constexpr,
    RC: tl.constexpr,
    KS: tl.constexpr,
    RS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
    BKC: tl.constexpr,
    BKS: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EPS: tl.constexpr,
):
    """Mix one group of one query."""
    i_m = tl.program_id(0).to(tl.int64)
    i_g = i_m % G
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    o_q = tl.arange(0, BQ)
    m_pc = (o_p < P)[:, None] & (o_c < C)[None, :]
    m_qc = (o_q < Q)[:, None] & (o_c < C)[None, :]
    p_m = p_w + i_m * (C * C + Q * P)

    b_y = mix_channels(
        p_x + i_m * P * C,
        p_m,
        p_cl + i_g * KC * C * RC,
        p_cc + i_m * KC * RC * RC,
        p_cr + i_g * KC * RC * C,
        P,
        C,
        KC,
        RC,
        BP,
        BC,
        BKC,
        BK,
        DOT,
        PRECISION,
    )
    b_y, y_mean, y_rstd = normalise(b_y, m_pc, P * C, EPS)
    b_y = tl.maximum(b_y, 0.0).to(DOT)

    b_fr = tl.zeros((BKS, BP), DOT)
    if KS > 0:
        b_fr = core_right(
            p_sc + i_m * KS * RS * RS,
            p_sr + i_g * KS * RS * P,
            P,
            KS,
            RS,
            BP,
            BKS,
            DOT,
            PRECISION,
        )
    b_s = spatial_tile(
        p_m + C * C,
        p_sl + i_g * KS * Q * RS,
        b_fr,
        o_q,
        Q,
        P,
        KS,
        RS,
        BP,
        BKS,
        DOT,
        PRECISION,
    )
    b_z = tl.dot(b_s, b_y, input_precision=PRECISION)
    b_z, z_mean, z_rstd = normalise(b_z, m_qc, Q * C, EPS)
    b_z = tl.maximum(b_z, 0.0)
    o_out = o_q[:, None] * C + o_c[None, :]
    p_out += i_m * Q * C
    tl.store(p_out + o_out, b_z.to(p_out.dtype.element_ty), mask=m_qc)
    p_stats += i_m * 4
    tl.store(p_stats, y_mean)
    tl.store(p_stats + 1, y_rstd)
    tl.store(p_stats + 2, z_mean)
    tl.store(p_stats + 3, z_rstd)
