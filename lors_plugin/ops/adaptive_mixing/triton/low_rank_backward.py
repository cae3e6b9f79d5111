"""Triton: gradients of the low-rank parts, as steps of backward.

Cores belong to a query; left and right factors belong to all, so what is
written for them is the share of this query.
"""

import triton
import triton.language as tl

from .forward_steps import matmul, store


@triton.jit
def store_cores(p, b, K: tl.constexpr, R: tl.constexpr, BKR: tl.constexpr):
    """Store the blocks on the diagonal of (BKR, BKR) as (K, r, r)."""
    o_j = tl.arange(0, BKR)
    i_k = o_j // R
    m = (i_k[:, None] == i_k[None, :]) & (o_j < K * R)[:, None]
    o = (i_k * (R * R) + (o_j % R) * R)[:, None] + (o_j % R)[None, :]
    m &= (o_j < K * R)[None, :]
    tl.store(p + o, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def spatial_low_rank_bwd(
    p_ds,  # (Q, P)
    p_f,  # (P, K r), (E R) transposed
    p_l,  # (Q, K r)
    p_e,  # (K, r, r)
    p_r,  # (K r, P)
    p_a,  # (K r, P), written: L' dS
    p_dl,  # (Q, K r), written
    p_de,  # (K, r, r), written
    p_dr,  # (K r, P), written
    P: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BKR: tl.constexpr,
    HOW: tl.constexpr,
    p_0,
    p_fresh,  # p_0 or None, see store
):
    """Gradients of ``L E R`` from the one of the formed matrix."""
    KR: tl.constexpr = K * R
    o_p = tl.arange(0, BP)
    o_j = tl.arange(0, BKR)
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        b_dl = tl.zeros((BQ, BKR), tl.float32)
        b_dl = matmul(
            b_dl, (p_ds, P, 1), (p_f, KR, 1), o_q, o_j, Q, KR, P, HOW, p_0
        )
        m = (o_q < Q)[:, None] & (o_j < KR)[None, :]
        store(p_dl, b_dl, KR, 1, o_q, o_j, m, p_fresh)
    b = tl.zeros((BKR, BP), tl.float32)
    b = matmul(b, (p_l, 1, KR), (p_ds, P, 1), o_j, o_p, KR, P, Q, HOW, p_0)
    m = (o_j < KR)[:, None] & (o_p < P)[None, :]
    store(p_a, b, P, 1, o_j, o_p, m, p_fresh)
    tl.debug_barrier()
    b = tl.zeros((BKR, BKR), tl.float32)
    b = matmul(b, (p_a, P, 1), (p_r, 1, P), o_j, o_j, KR, KR, P, HOW, p_0)
    store_cores(p_de, b, K, R, BKR)
    b = tl.zeros((BP, BKR), tl.float32)
    b = matmul(
        b, (p_a, 1, P), (p_e, R, 1), o_p, o_j, P, KR, KR, HOW, p_0, CORE=R
    )
    m = (o_p < P)[:, None] & (o_j < KR)[None, :]
    store(p_dr, b, 1, P, o_p, o_j, m, p_fresh)


@triton.jit
def channel_low_rank_bwd(
    p_x,  # (P, C)
    p_dy,  # (P, C), before the first norm
    p_t,  # (P, K r), x L
    p_u,  # (P, K r), x L E
    p_v,  # (P, K r), written: dy R'
    p_w,  # (P, K r), written: dy R' E'
    p_e,  # (K, r, r)
    p_r,  # (K r, C)
    p_dl,  # (C, K r), written
    p_de,  # (K, r, r), written
    p_dr,  # (K r, C), written
    P: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BKR: tl.constexpr,
    HOW: tl.constexpr,
    p_0,
    p_fresh,  # p_0 or None, see store
):
    """Gradients of ``L E R`` from the one of the product."""
    KR: tl.constexpr = K * R
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    o_j = tl.arange(0, BKR)
    m_t = (o_p < P)[:, None] & (o_j < KR)[None, :]
    b = tl.zeros((BKR, BC), tl.float32)
    b = matmul(b, (p_u, 1, KR), (p_dy, C, 1), o_j, o_c, KR, C, P, HOW, p_0)
    m = (o_j < KR)[:, None] & (o_c < C)[None, :]
    store(p_dr, b, C, 1, o_j, o_c, m, p_fresh)
    b_0 = tl.zeros((BP, BKR), tl.float32)
    b = matmul(b_0, (p_dy, C, 1), (p_r, 1, C), o_p, o_j, P, KR, C, HOW, p_0)
    store(p_v, b, KR, 1, o_p, o_j, m_t, p_fresh)
    tl.debug_barrier()
    b = tl.zeros((BKR, BKR), tl.float32)
    b = matmul(b, (p_t, 1, KR), (p_v, KR, 1), o_j, o_j, KR, KR, P, HOW, p_0)
    store_cores(p_de, b, K, R, BKR)
    b = matmul(
        b_0, (p_v, KR, 1), (p_e, 1, R), o_p, o_j, P, KR, KR, HOW, p_0, CORE=R
    )
    store(p_w, b, KR, 1, o_p, o_j, m_t, p_fresh)
    tl.debug_barrier()
    b = tl.zeros((BC, BKR), tl.float32)
    b = matmul(b, (p_x, 1, C), (p_w, KR, 1), o_c, o_j, C, KR, P, HOW, p_0)
    m = (o_c < C)[:, None] & (o_j < KR)[None, :]
    store(p_dl, b, KR, 1, o_c, o_j, m, p_fresh)
