"""Triton: adaptive mixing backward.

A program takes one group of one query after the other. It reads the inputs
and the statistics of both norms, makes everything else again and writes the
gradients of ``x``, of both matrices and of both cores, which are this query's
own. The left and right factors belong to all queries: a program writes the
query's share of their gradients, and the launcher adds the shares up in a
fixed order. There are no atomics: the result is deterministic.
"""

import triton
import triton.language as tl

from .forward_steps import channel_step, matmul, spatial_step, store
from .low_rank_backward import (
    channel_low_rank_bwd,
    spatial_low_rank_bwd,
)


@triton.jit
def norm_relu_bwd(b_grad, b_hat, m, rstd, mean_grad, mean_grad_hat):
    """Gradient before a layer norm from the one after its ReLU."""
    b_grad = tl.where(b_hat > 0, b_grad, 0.0)
    b = b_grad - mean_grad - b_hat * mean_grad_hat
    return tl.where(m, rstd * b, 0.0)


@triton.jit
def spatial_bwd(
    p_go,  # (Q, C)
    p_st,  # (Q, P), formed
    p_y,  # (P, C), normalised, before the ReLU
    p_dz,  # (Q, C), written
    p_ds,  # (Q, P), written
    z_mean,
    z_rstd,
    P: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
    HOW: tl.constexpr,
    p_0,
):
    """Gradients before the second norm and of the spatial matrix."""
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    sum_g = 0.0
    sum_gz = 0.0
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        m = (o_q < Q)[:, None] & (o_c < C)[None, :]
        o = o_q[:, None] * C + o_c[None, :]
        b_z = matmul(
            tl.zeros((BQ, BC), tl.float32),
            (p_st, P, 1),
            (p_y, C, 1),
            o_q,
            o_c,
            Q,
            C,
            P,
            HOW,
            p_0,
            RELU=True,
        )
        b_z = (b_z - z_mean) * z_rstd
        b_g = tl.load(p_go + o, mask=m, other=0).to(tl.float32)
        b_g = tl.where(b_z > 0, b_g, 0.0)
        sum_g += tl.sum(tl.sum(b_g, 1), 0)
        sum_gz += tl.sum(tl.sum(b_g * b_z, 1), 0)
        store(p_dz, b_z, C, 1, o_q, o_c, m)
    tl.debug_barrier()
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        m = (o_q < Q)[:, None] & (o_c < C)[None, :]
        o = o_q[:, None] * C + o_c[None, :]
        b_z = tl.load(p_dz + o, mask=m, other=0).to(tl.float32)
        b_g = tl.load(p_go + o, mask=m, other=0).to(tl.float32)
        b_z = norm_relu_bwd(
            b_g, b_z, m, z_rstd, sum_g / (Q * C), sum_gz / (Q * C)
        )
        tl.debug_barrier()
        store(p_dz, b_z, C, 1, o_q, o_c, m)
    tl.debug_barrier()
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        b_ds = matmul(
            tl.zeros((BQ, BP), tl.float32),
            (p_dz, C, 1),
            (p_y, 1, C),
            o_q,
            o_p,
            Q,
            P,
            C,
            HOW,
            p_0,
            RELU=True,
        )
        m = (o_q < Q)[:, None] & (o_p < P)[None, :]
        store(p_ds, b_ds, P, 1, o_q, o_p, m)
    tl.debug_barrier()


@triton.jit(do_not_specialize=['num'])
def adaptive_mixing_bwd_kernel(
    p_go,  # (B N G, Q, C)
    p_x,  # (B N G, P, C)
    p_w,  # (B N G, C C + Q P)
    p_cl,  # (G, C, KC RC)
    p_cc,  # (B N G, KC, RC, RC)
    p_cr,  # (G, KC RC, C)
    p_sl,  # (G, Q, KS RS)
    p_sc,  # (B N G, KS, RS, RS)
    p_sr,  # (G, KS RS, P)
    p_stats,  # (B N G, 4)
    p_dx,  # (B N G, P, C)
    p_dw,  # (B N G, C C + Q P)
    p_dcl,  # (B N G, C, KC RC), shares
    p_dcc,  # (B N G, KC, RC, RC)
    p_dcr,  # (B N G, KC RC, C), shares
    p_dsl,  # (B N G, Q, KS RS), shares
    p_dsc,  # (B N G, KS, RS, RS)
    p_dsr,  # (B N G, KS RS, P), shares
    p_scratch,  # (programs, SCRATCH)
    num,  # B N G
    p_0,  # (1, ), zero, see matmul
    SCRATCH: tl.constexpr,
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
    FRESH: tl.constexpr,
):
    """All gradients of groups of queries, one after the other."""
    HOW: tl.constexpr = (BK, DOT, PRECISION)
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    m_pc = (o_p < P)[:, None] & (o_c < C)[None, :]
    o_pc = o_p[:, None] * C + o_c[None, :]
    p_y = p_scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    p_dz = p_y + P * C
    p_st = p_dz + Q * C
    p_t = p_st + Q * P
    p_u = p_t + P * KC * RC
    p_v = p_u + P * KC * RC
    p_f = p_v + P * KC * RC
    p_a = p_f + P * KS * RS
    i_first = tl.program_id(0).to(tl.int64)
    for i_m in range(i_first, num, tl.num_programs(0)):
        i_g = i_m % G
        p_xm = p_x + i_m * P * C
        p_m = p_w + i_m * (C * C + Q * P)
        p_dm = p_dw + i_m * (C * C + Q * P)
        y_mean = tl.load(p_stats + i_m * 4)
        y_rstd = tl.load(p_stats + i_m * 4 + 1)
        z_mean = tl.load(p_stats + i_m * 4 + 2)
        z_rstd = tl.load(p_stats + i_m * 4 + 3)
        b_y = channel_step(
            p_xm,
            p_m,
            p_cl + i_g * C * KC * RC,
            p_cc + i_m * KC * RC * RC,
            p_cr + i_g * KC * RC * C,
            p_t,
            p_u,
            P,
            C,
            KC,
            RC,
            BP,
            BC,
            BKC,
            HOW,
            p_0,
        )
        store(p_y, (b_y - y_mean) * y_rstd, C, 1, o_p, o_c, m_pc)
        tl.debug_barrier()

        p_s = p_m + C * C
        p_ds = p_dm + C * C
        if KS > 0:
            spatial_step(
                p_s,
                p_sl + i_g * Q * KS * RS,
                p_sc + i_m * KS * RS * RS,
                p_sr + i_g * KS * RS * P,
                p_f,
                p_st,
                P,
                Q,
                KS,
                RS,
                BP,
                BQ,
                BKS,
                HOW,
                p_0,
            )
        p_sf = p_st if KS > 0 else p_s
        spatial_bwd(
            p_go + i_m * Q * C,
            p_sf,
            p_y,
            p_dz,
            p_ds,
            z_mean,
            z_rstd,
            P,
            C,
            Q,
            BP,
            BC,
            BQ,
            HOW,
            p_0,
        )
        if KS > 0:
            spatial_low_rank_bwd(
                p_ds,
                p_f,
                p_sl + i_g * Q * KS * RS,
                p_sc + i_m * KS * RS * RS,
                p_sr + i_g * KS * RS * P,
                p_a,
                p_dsl + i_m * Q * KS * RS,
                p_dsc + i_m * KS * RS * RS,
                p_dsr + i_m * KS * RS * P,
                P,
                Q,
                KS,
                RS,
                BP,
                BQ,
                BKS,
                HOW,
                p_0,
                p_0 if FRESH else None,
            )

        b = tl.zeros((BP, BC), tl.float32)
        b = matmul(b, (p_sf, 1, P), (p_dz, C, 1), o_p, o_c, P, C, Q, HOW, p_0)
        b_y = tl.load(p_y + o_pc, mask=m_pc, other=0).to(tl.float32)
        b_g = tl.where(b_y > 0, b, 0.0)
        mean_g = tl.sum(tl.sum(b_g, 1), 0) / (P * C)
        mean_gy = tl.sum(tl.sum(b_g * b_y, 1), 0) / (P * C)
        b = norm_relu_bwd(b_g, b_y, m_pc, y_rstd, mean_g, mean_gy)
        tl.debug_barrier()
        store(p_y, b, C, 1, o_p, o_c, m_pc)
        tl.debug_barrier()

        b = tl.zeros((BP, BC), tl.float32)
        if KC > 0:
            KR: tl.constexpr = KC * RC
            p_l = p_cl + i_g * C * KR
            channel_low_rank_bwd(
                p_xm,
                p_y,
                p_t,
                p_u,
                p_v,
                p_u,
                p_cc + i_m * KR * RC,
                p_cr + i_g * KR * C,
                p_dcl + i_m * C * KR,
                p_dcc + i_m * KR * RC,
                p_dcr + i_m * KR * C,
                P,
                C,
                KC,
                RC,
                BP,
                BC,
                BKC,
                HOW,
                p_0,
                p_0 if FRESH else None,
            )
            b = matmul(
                b, (p_u, KR, 1), (p_l, 1, KR), o_p, o_c, P, C, KR, HOW, p_0
            )
        b = matmul(b, (p_y, C, 1), (p_m, 1, C), o_p, o_c, P, C, C, HOW, p_0)
        store(p_dx + i_m * P * C, b, C, 1, o_p, o_c, m_pc)
        for i_c in range(0, C, BQ):
            o_k = i_c + tl.arange(0, BQ)
            b_dm = tl.zeros((BQ, BC), tl.float32)
            b_dm = matmul(
                b_dm, (p_xm, 1, C), (p_y, C, 1), o_k, o_c, C, C, P, HOW, p_0
            )
            m = (o_k < C)[:, None] & (o_c < C)[None, :]
            store(p_dm, b_dm, C, 1, o_k, o_c, m)
        tl.debug_barrier()
