"""Triton: adaptive mixing as steps over memory of a program's own.

Backward, and forward without tensor cores, have more to keep than registers
hold. There a program is a sequence of small matrix products whose operands
it reads in slices, and what one step leaves for the next goes through a
scratch buffer. There are as many programs as the device runs at a time, each
with one scratch buffer for all its queries in turn, so the buffers stay in
the level-2 cache.

Left factors are matrices of ``K r`` columns, right factors of ``K r`` rows.
The cores are the blocks on the diagonal of a matrix between them.

A matrix that is multiplied is given as its pointer and the strides of its
rows and columns. ``HOW`` holds what is the same for all products of a kernel:
the length of a slice, the type and the precision.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(
    b,  # (len(o_i), len(o_j)), what to add to
    a_matrix,
    b_matrix,
    o_i,
    o_j,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    D: tl.constexpr,
    HOW: tl.constexpr,
    p_0,
    CORE: tl.constexpr = 0,
    RELU: tl.constexpr = False,
):
    """Add ``a[o_i, :D] @ b[:D, o_j]`` of an (I, D) and a (D, J) matrix.

    With ``CORE``, the second matrix is made of blocks of that size on the
    diagonal, which lie one after the other. ``RELU`` applies to it too.

    The first slice is at zero, which the compiler must not know: it would
    unroll all loops, share offsets between products and keep them all in
    registers.
    """
    p_a, p_b = a_matrix[0], b_matrix[0]
    A_ROW: tl.constexpr = a_matrix[1]
    A_COL: tl.constexpr = a_matrix[2]
    B_ROW: tl.constexpr = b_matrix[1]
    B_COL: tl.constexpr = b_matrix[2]
    BK: tl.constexpr = HOW[0]
    DOT: tl.constexpr = HOW[1]
    i_0 = tl.multiple_of(tl.load(p_0, volatile=True), 16)
    o_i += i_0
    o_j += i_0
    for i_d in range(i_0, D, BK):
        o_d = i_d + tl.arange(0, BK)
        m_a = (o_i < I)[:, None] & (o_d < D)[None, :]
        m_b = (o_d < D)[:, None] & (o_j < J)[None, :]
        o_a = o_i[:, None] * A_ROW + o_d[None, :] * A_COL
        if CORE > 0:
            m_b &= (o_d // CORE)[:, None] == (o_j // CORE)[None, :]
            o_row = (o_d // CORE) * (CORE * CORE) + (o_d % CORE) * B_ROW
            o_b = o_row[:, None] + ((o_j % CORE) * B_COL)[None, :]
        else:
            o_b = o_d[:, None] * B_ROW + o_j[None, :] * B_COL
        b_a = tl.load(p_a + o_a, mask=m_a, other=0).to(DOT)
        b_b = tl.load(p_b + o_b, mask=m_b, other=0).to(DOT)
        if RELU:
            b_b = tl.where(b_b > 0, b_b, 0.0).to(DOT)
        b = tl.dot(b_a, b_b, b, input_precision=HOW[2])
    return b


@triton.jit
def store(p, b, ROW: tl.constexpr, COL: tl.constexpr, o_i, o_j, m, p_0=None):
    """Store a tile in the type of the memory.

    With ``p_0``, offsets are computed again, as in :func:`matmul`.
    """
    if p_0 is not None:
        i_0 = tl.multiple_of(tl.load(p_0, volatile=True), 16)
        o_i += i_0
        o_j += i_0
    o = o_i[:, None] * ROW + o_j[None, :] * COL
    tl.store(p + o, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def channel_step(
    p_x,  # (P, C)
    p_m,  # (C, C)
    p_l,  # (C, K r)
    p_e,  # (K, r, r)
    p_r,  # (K r, C)
    p_t,  # (P, K r), written: x L
    p_u,  # (P, K r), written: x L E
    P: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BKR: tl.constexpr,
    HOW: tl.constexpr,
    p_0,
):
    """Multiply ``x (M + L E R)``, the low-rank part kept in factors."""
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    b_y = tl.zeros((BP, BC), tl.float32)
    if K > 0:
        KR: tl.constexpr = K * R
        o_j = tl.arange(0, BKR)
        m_t = (o_p < P)[:, None] & (o_j < KR)[None, :]
        b_0 = tl.zeros((BP, BKR), tl.float32)
        b_t = matmul(
            b_0, (p_x, C, 1), (p_l, KR, 1), o_p, o_j, P, KR, C, HOW, p_0
        )
        store(p_t, b_t, KR, 1, o_p, o_j, m_t)
        tl.debug_barrier()
        b_u = matmul(
            b_0,
            (p_t, KR, 1),
            (p_e, R, 1),
            o_p,
            o_j,
            P,
            KR,
            KR,
            HOW,
            p_0,
            CORE=R,
        )
        store(p_u, b_u, KR, 1, o_p, o_j, m_t)
        tl.debug_barrier()
        b_y = matmul(
            b_y, (p_u, KR, 1), (p_r, C, 1), o_p, o_c, P, C, KR, HOW, p_0
        )
    return matmul(b_y, (p_x, C, 1), (p_m, C, 1), o_p, o_c, P, C, C, HOW, p_0)


@triton.jit
def spatial_step(
    p_s,  # (Q, P)
    p_l,  # (Q, K r)
    p_e,  # (K, r, r)
    p_r,  # (K r, P)
    p_f,  # (P, K r), written: (E R) transposed
    p_st,  # (Q, P), written: S + L E R
    P: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BKR: tl.constexpr,
    HOW: tl.constexpr,
    p_0,
):
    """Form ``S + L E R``: fewer products than keeping the factors."""
    KR: tl.constexpr = K * R
    o_p = tl.arange(0, BP)
    o_j = tl.arange(0, BKR)
    b_0 = tl.zeros((BP, BKR), tl.float32)
    b_f = matmul(
        b_0, (p_r, 1, P), (p_e, 1, R), o_p, o_j, P, KR, KR, HOW, p_0, CORE=R
    )
    m_f = (o_p < P)[:, None] & (o_j < KR)[None, :]
    store(p_f, b_f, KR, 1, o_p, o_j, m_f)
    tl.debug_barrier()
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        m = (o_q < Q)[:, None] & (o_p < P)[None, :]
        o = o_q[:, None] * P + o_p[None, :]
        b_s = tl.load(p_s + o, mask=m, other=0).to(tl.float32)
        b_s = matmul(
            b_s, (p_l, KR, 1), (p_f, 1, KR), o_q, o_p, Q, P, KR, HOW, p_0
        )
        store(p_st, b_s, P, 1, o_q, o_p, m)
    tl.debug_barrier()


@triton.jit(do_not_specialize=['num'])
def adaptive_mixing_fwd_kernel_steps(
    p_x,  # (B N G, P, C)
    p_w,  # (B N G, C C + Q P)
    p_cl,  # (G, C, KC RC)
    p_cc,  # (B N G, KC, RC, RC)
    p_cr,  # (G, KC RC, C)
    p_sl,  # (G, Q, KS RS)
    p_sc,  # (B N G, KS, RS, RS)
    p_sr,  # (G, KS RS, P)
    p_out,  # (B N G, Q, C)
    p_stats,  # (B N G, 4)
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
    EPS: tl.constexpr,
):
    """Mix groups of queries, one after the other; scratch is float32."""
    HOW: tl.constexpr = (BK, DOT, PRECISION)
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    m_pc = (o_p < P)[:, None] & (o_c < C)[None, :]
    p_y = p_scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    p_z = p_y + P * C
    p_st = p_z + Q * C
    p_t = p_st + Q * P
    p_u = p_t + P * KC * RC
    p_f = p_u + P * KC * RC
    i_first = tl.program_id(0).to(tl.int64)
    for i_m in range(i_first, num, tl.num_programs(0)):
        i_g = i_m % G
        p_m = p_w + i_m * (C * C + Q * P)
        b_y = channel_step(
            p_x + i_m * P * C,
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
        y_mean = tl.sum(tl.sum(b_y, 1), 0) / (P * C)
        b_y = tl.where(m_pc, b_y - y_mean, 0.0)
        y_var = tl.sum(tl.sum(b_y * b_y, 1), 0) / (P * C)
        y_rstd = 1.0 / tl.sqrt(y_var + EPS)
        store(p_y, tl.maximum(b_y * y_rstd, 0.0), C, 1, o_p, o_c, m_pc)
        tl.debug_barrier()

        p_sm = p_m + C * C
        if KS > 0:
            spatial_step(
                p_sm,
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
        z_sum = 0.0
        for i_q in range(0, Q, BQ):
            o_q = i_q + tl.arange(0, BQ)
            b_z = tl.zeros((BQ, BC), tl.float32)
            p_a = p_st if KS > 0 else p_sm
            b_z = matmul(
                b_z, (p_a, P, 1), (p_y, C, 1), o_q, o_c, Q, C, P, HOW, p_0
            )
            m_qc = (o_q < Q)[:, None] & (o_c < C)[None, :]
            store(p_z, b_z, C, 1, o_q, o_c, m_qc)
            z_sum += tl.sum(tl.sum(b_z, 1), 0)
        tl.debug_barrier()
        z_mean = z_sum / (Q * C)
        z_var = 0.0
        for i_q in range(0, Q, BQ):
            o_q = i_q + tl.arange(0, BQ)
            m_qc = (o_q < Q)[:, None] & (o_c < C)[None, :]
            o_qc = o_q[:, None] * C + o_c[None, :]
            b_z = tl.load(p_z + o_qc, mask=m_qc, other=0)
            b_z = tl.where(m_qc, b_z - z_mean, 0.0)
            z_var += tl.sum(tl.sum(b_z * b_z, 1), 0)
        z_rstd = 1.0 / tl.sqrt(z_var / (Q * C) + EPS)
        for i_q in range(0, Q, BQ):
            o_q = i_q + tl.arange(0, BQ)
            m_qc = (o_q < Q)[:, None] & (o_c < C)[None, :]
            o_qc = o_q[:, None] * C + o_c[None, :]
            b_z = tl.load(p_z + o_qc, mask=m_qc, other=0)
            b_z = tl.maximum((b_z - z_mean) * z_rstd, 0.0)
            store(p_out + i_m * Q * C, b_z, C, 1, o_q, o_c, m_qc)
        tl.store(p_stats + i_m * 4, y_mean)
        tl.store(p_stats + i_m * 4 + 1, y_rstd)
        tl.store(p_stats + i_m * 4 + 2, z_mean)
        tl.store(p_stats + i_m * 4 + 3, z_rstd)
        tl.debug_barrier()
