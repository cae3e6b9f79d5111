// Adaptive mixing of one group of queries: what Python hands over.
//
// Matrices are float32, row by row without gaps. Strides are numbers from one
// query to the next. What is written overlaps nothing else. Fields and order
// as in ops/adaptive_mixing/compiled.py.

#pragma once

#include <cstdint>

// Low-rank part sum_k left_k core_k right_k of a matrix (rows, cols).
struct LowRank {
  int64_t num;          // K, 0 for no part
  int64_t rank;         // r
  const float* left;    // (rows, K r)
  const float* core;    // (K, r, r) a query
  int64_t core_stride;
  const float* right;   // (K r, cols)
  const float* right_t; // (cols, K r), in backward
  float* grad_core;     // as core, written
  int64_t grad_core_stride;
  float* grad_left;     // (threads, rows, K r), added to
  float* grad_right;    // (threads, K r, cols), added to
};

struct Mixing {
  int64_t queries;
  int64_t points;  // P
  int64_t width;   // C
  int64_t rows;    // Q
  int64_t threads;
  int64_t complete; // the matrices have their low-rank parts
  int64_t in_place; // add low-rank parts to the matrices where they lie
  double eps;
  const float* x;       // (P, C) a query
  int64_t x_stride;
  float* channel;       // (C, C)
  int64_t channel_stride;
  float* spatial;       // (Q, P)
  int64_t spatial_stride;
  float* out;           // (Q, C), of forward
  int64_t out_stride;
  float* stats;         // (4, ), written in forward and read in backward
  int64_t stats_stride;
  float* scratch;       // (threads, scratch_floats)
  int64_t scratch_floats;
  const float* grad_out; // (Q, C), of backward and so on
  int64_t grad_out_stride;
  float* grad_x;        // (P, C)
  int64_t grad_x_stride;
  float* grad_channel;  // (C, C)
  int64_t grad_channel_stride;
  float* grad_spatial;  // (Q, P)
  int64_t grad_spatial_stride;
  LowRank channel_part;
  LowRank spatial_part;
};

// Memory of a thread, its parts in whole cache lines.
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

// Queries first to last of one thread.
typedef void (*Run)(const Mixing&, int64_t first, int64_t last, int64_t thread);
