// Adaptive mixing: what Python hands over.
//
// All tensors are float32, and the matrix of one query and group lies row by
// row without gaps. What is written overlaps nothing else. Fields and their
// order as in ops/adaptive_mixing/cpu_impl.py.

#pragma once

#include <cstdint>

// Matrices of all queries and groups; strides are in elements.
struct Matrices {
  float* data;
  int64_t query_stride;
  int64_t group_stride;

  float* at(int64_t query, int64_t group) const {
    return data + query * query_stride + group * group_stride;
  }
};

// Low-rank part sum_k left_k core_k right_k of matrices (rows, cols).
struct LowRank {
  int64_t num;           // K, 0 for no part
  int64_t rank;          // r
  Matrices core;         // (K, r, r)
  Matrices grad_core;    // (K, r, r), written in backward
  const float* left;     // (G, rows, K r)
  const float* right;    // (G, K r, cols)
  const float* right_t;  // (G, cols, K r), in backward
  float* grad_left;      // (threads, G, rows, K r), added to
  float* grad_right;     // (threads, G, K r, cols), added to
};

struct Mixing {
  int64_t queries;
  int64_t groups;
  int64_t points;  // P
  int64_t width;   // C
  int64_t rows;    // Q
  int64_t threads;
  double eps;
  Matrices x;             // (P, C)
  Matrices channel;       // (C, C)
  Matrices spatial;       // (Q, P)
  Matrices out;           // (Q, C), written in forward
  Matrices stats;         // (4, ), written in forward, read in backward
  Matrices grad_out;      // (Q, C), read in backward
  Matrices grad_x;        // (P, C), written in backward, and so on
  Matrices grad_channel;  // (C, C)
  Matrices grad_spatial;  // (Q, P)
  LowRank channel_part;
  LowRank spatial_part;
  float* scratch;         // (threads, scratch_floats)
  int64_t scratch_floats;
};

// Memory of a thread, each array in whole cache lines.
struct Scratch {
  int64_t size = 0;
  float* base;
  float *y, *channel, *spatial, *inner;  // of both directions
  float *normed_y, *z, *grad_z, *turned, *inner_t;

  Scratch(const Mixing& mixing, float* memory) : base(memory) {
    const int64_t p = mixing.points, c = mixing.width, q = mixing.rows;
    const LowRank &of_c = mixing.channel_part, &of_s = mixing.spatial_part;
    const int64_t inner_c = of_c.num * of_c.rank * c;
    const int64_t inner_s = of_s.num * of_s.rank * p;
    const int64_t inner_size = inner_c > inner_s ? inner_c : inner_s;
    y = take(p * c);
    channel = take(c * c);
    spatial = take(q * p);
    inner = take(inner_size);
    normed_y = take(p * c);
    z = take(q * c);
    grad_z = take(q * c);
    turned = take(c * (c > p ? c : p));
    inner_t = take(inner_size);
  }

  float* take(int64_t number) {
    float* const part = base ? base + size : nullptr;
    size += (number + 15) / 16 * 16;
    return part;
  }
};

// Queries first to last of one thread, in all groups.
typedef void (*Run)(const Mixing&, int64_t first, int64_t last, int64_t thread);
