// Adaptive mixing for one set of instructions, included once for each.
//
// KERNELS is the namespace; LANES floats fit into a register, and a tile of
// TILE_ROWS times TILE_VECTORS registers of sums into all of them.

namespace KERNELS {

// `type` for values, `any` for what lies anywhere in memory.
template <int lanes>
struct Vector;

#define VECTOR(lanes)                                              \
  template <>                                                      \
  struct Vector<lanes> {                                           \
    typedef float type __attribute__((vector_size(4 * lanes)));    \
    typedef float any __attribute__((vector_size(4 * lanes),       \
                                     aligned(4), may_alias));      \
  };
VECTOR(4)
VECTOR(8)
VECTOR(16)
#undef VECTOR

template <int lanes>
INLINE typename Vector<lanes>::type load(const float* p) {
  return *(const typename Vector<lanes>::any*)p;
}

template <int lanes>
INLINE void store(float* p, typename Vector<lanes>::type v) {
  *(typename Vector<lanes>::any*)p = v;
}

// A matrix of which element (i, j) lies at p[i * row + j * col].
struct View {
  const float* p;
  int64_t row, col;
};

// out = init + a b for `rows` rows and `vectors * lanes` columns; sums stay in
// registers. No init stands for zeros.
template <int rows, int vectors, int lanes>
INLINE void tile(int64_t depth, View a, const float* b, int64_t b_row,
                 const float* init, float* out, int64_t out_row) {
  typedef typename Vector<lanes>::type V;
  V sums[rows][vectors];
  UNROLL
  for (int i = 0; i < rows; i++) {
    UNROLL
    for (int j = 0; j < vectors; j++)
      sums[i][j] = init ? load<lanes>(init + i * out_row + j * lanes) : V{};
  }
  for (int64_t k = 0; k < depth; k++) {
    V line[vectors];
    UNROLL
    for (int j = 0; j < vectors; j++)
      line[j] = load<lanes>(b + k * b_row + j * lanes);
    UNROLL
    for (int i = 0; i < rows; i++) {
      const V factor = a.p[i * a.row + k * a.col] - V{};
      UNROLL
      for (int j = 0; j < vectors; j++) sums[i][j] += factor * line[j];
    }
  }
  UNROLL
  for (int i = 0; i < rows; i++) {
    UNROLL
    for (int j = 0; j < vectors; j++)
      store<lanes>(out + i * out_row + j * lanes, sums[i][j]);
  }
}

// All rows of some columns, in tiles of `rows` and halves of that.
template <int rows, int vectors, int lanes>
INLINE void columns(int64_t m, int64_t depth, View a, const float* b,
                    int64_t b_row, const float* init, float* out,
                    int64_t out_row) {
  int64_t i = 0;
  for (; i + rows <= m; i += rows)
    tile<rows, vectors, lanes>(depth, {a.p + i * a.row, a.row, a.col}, b,
                               b_row, init ? init + i * out_row : nullptr,
                               out + i * out_row, out_row);
  if constexpr (rows > 1) {
    if (i < m)
      columns<rows / 2, vectors, lanes>(
          m - i, depth, {a.p + i * a.row, a.row, a.col}, b, b_row,
          init ? init + i * out_row : nullptr, out + i * out_row, out_row);
  }
}

// out (m, n) = init + a (m, depth) b (depth, n); init may be out.
static void multiply(int64_t m, int64_t n, int64_t depth, View a,
                     const float* b, int64_t b_row, const float* init,
                     float* out, int64_t out_row) {
  int64_t j = 0;
#define COLUMNS(rows, vectors, lanes)                                     \
  for (; j + (vectors) * (lanes) <= n; j += (vectors) * (lanes))          \
    columns<rows, vectors, lanes>(m, depth, a, b + j, b_row,              \
                                  init ? init + j : nullptr, out + j, out_row);
  COLUMNS(TILE_ROWS, TILE_VECTORS, LANES)
  COLUMNS(2 * TILE_ROWS, TILE_VECTORS / 2, LANES)
#if TILE_VECTORS > 2
  COLUMNS(2 * TILE_ROWS, 1, LANES)
#endif
#if LANES > 8
  COLUMNS(2 * TILE_ROWS, 1, 8)
#endif
#if LANES > 4
  COLUMNS(2 * TILE_ROWS, 1, 4)
#endif
#undef COLUMNS
  for (; j < n; j++)
    for (int64_t i = 0; i < m; i++) {
      float sum = init ? init[i * out_row + j] : 0;
      for (int64_t k = 0; k < depth; k++)
        sum += a.p[i * a.row + k * a.col] * b[k * b_row + j];
      out[i * out_row + j] = sum;
    }
}

INLINE View plain(const float* p, int64_t width) { return {p, width, 1}; }
INLINE View transposed(const float* p, int64_t width) { return {p, 1, width}; }

#ifdef SHUFFLE
// Exchange what lies off the diagonal of blocks of 2 x `step`, step by step.
template <int step>
INLINE void exchange(typename Vector<LANES>::type* v) {
  typedef typename Vector<LANES>::type V;
  typedef int Mask __attribute__((vector_size(4 * LANES)));
  Mask upper, lower;
  UNROLL
  for (int j = 0; j < LANES; j++) {
    upper[j] = j & step ? LANES + j - step : j;
    lower[j] = j & step ? LANES + j : j + step;
  }
  UNROLL
  for (int i = 0; i < LANES; i++)
    if (!(i & step)) {
      const V a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + step] = __builtin_shuffle(a, b, lower);
    }
  if constexpr (step > 1) exchange<step / 2>(v);
}
#endif

// out (n, m) = x (m, n) transposed.
static void transpose(int64_t m, int64_t n, const float* x, float* out) {
  int64_t whole_m = 0, whole_n = 0;
#ifdef SHUFFLE
  whole_m = m / LANES * LANES;
  whole_n = n / LANES * LANES;
  for (int64_t i = 0; i < whole_m; i += LANES)
    for (int64_t j = 0; j < whole_n; j += LANES) {
      typename Vector<LANES>::type v[LANES];
      UNROLL
      for (int l = 0; l < LANES; l++) v[l] = load<LANES>(x + (i + l) * n + j);
      exchange<LANES / 2>(v);
      UNROLL
      for (int l = 0; l < LANES; l++)
        store<LANES>(out + (j + l) * m + i, v[l]);
    }
#endif
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = i < whole_m ? whole_n : 0; j < n; j++)
      out[j * m + i] = x[i * n + j];
}

// Of `size` numbers: `sum` of f(vector) by vectors, g(number) for the rest.
template <typename F, typename G>
INLINE float sum_of(int64_t size, F f, G g) {
  typedef typename Vector<LANES>::type V;
  V sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES) {
    UNROLL
    for (int l = 0; l < 4; l++) sums[l] += f(i + l * LANES);
  }
  const V all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int l = 0; l < LANES; l++) total += all[l];
  for (; i < size; i++) total += g(i);
  return total;
}

// Norm of all `size` numbers: (x - mean) / deviation, in place. ReLU keeps
// what is not a number.
INLINE void norm_relu(float* x, int64_t size, float eps, float* stats) {
  const float mean =
      sum_of(
          size, [&](int64_t i) { return load<LANES>(x + i); },
          [&](int64_t i) { return x[i]; }) /
      size;
  const float variance = sum_of(
                             size,
                             [&](int64_t i) {
                               const auto v = load<LANES>(x + i) - mean;
                               return v * v;
                             },
                             [&](int64_t i) {
                               return (x[i] - mean) * (x[i] - mean);
                             }) /
                         size;
  const float rstd = 1 / __builtin_sqrtf(variance + eps);
  for (int64_t i = 0; i < size; i++) {
    const float v = (x[i] - mean) * rstd;
    x[i] = v < 0 ? 0 : v;
  }
  stats[0] = mean;
  stats[1] = rstd;
}

// Gradient behind norm and ReLU to the one before them, in place.
//
// `normed` is (x - mean) / deviation, before the ReLU.
INLINE void norm_relu_backward(const float* grad_out, const float* normed,
                               int64_t size, float rstd, float* grad) {
  typedef typename Vector<LANES>::type V;
  const V zero = {};
  const auto masked = [&](int64_t i) {
    const V g = load<LANES>(grad_out + i);
    return load<LANES>(normed + i) <= zero ? zero : g;
  };
  const auto masked_one = [&](int64_t i) {
    return normed[i] <= 0 ? 0.f : grad_out[i];
  };
  const float mean = sum_of(size, masked, masked_one) / size;
  const float slope =
      sum_of(
          size, [&](int64_t i) { return masked(i) * load<LANES>(normed + i); },
          [&](int64_t i) { return masked_one(i) * normed[i]; }) /
      size;
  for (int64_t i = 0; i < size; i++)
    grad[i] = rstd * (masked_one(i) - mean - normed[i] * slope);
}

// inner (K r, cols) = core_k right_k, one below the other.
INLINE void make_inner(const LowRank& part, const float* core,
                       const float* right, int64_t cols, float* inner) {
  const int64_t rank = part.rank;
  for (int64_t k = 0; k < part.num; k++)
    multiply(rank, cols, rank, plain(core + k * rank * rank, rank),
             right + k * rank * cols, cols, nullptr, inner + k * rank * cols,
             cols);
}

// The matrix of a query and group with its low-rank part, which is formed in
// `into`; the generated matrix itself where there is no part.
INLINE const float* full_matrix(const LowRank& part, int64_t query,
                                int64_t group, int64_t rows, int64_t cols,
                                const float* generated, float* inner,
                                float* into) {
  if (!part.num) return generated;
  const int64_t depth = part.num * part.rank;
  make_inner(part, part.core.at(query, group),
             part.right + group * depth * cols, cols, inner);
  multiply(rows, cols, depth, plain(part.left + group * rows * depth, depth),
           inner, cols, generated, into, cols);
  return into;
}

INLINE void forward_one(const Mixing& mixing, int64_t n, int64_t g,
                        const Scratch& scratch) {
  const int64_t p = mixing.points, c = mixing.width, q = mixing.rows;
  float *const stats = mixing.stats.at(n, g), *const out = mixing.out.at(n, g);
  const float* const channel =
      full_matrix(mixing.channel_part, n, g, c, c, mixing.channel.at(n, g),
                  scratch.inner, scratch.channel);
  multiply(p, c, c, plain(mixing.x.at(n, g), c), channel, c, nullptr,
           scratch.y, c);
  norm_relu(scratch.y, p * c, mixing.eps, stats);
  const float* const spatial =
      full_matrix(mixing.spatial_part, n, g, q, p, mixing.spatial.at(n, g),
                  scratch.inner, scratch.spatial);
  multiply(q, c, p, plain(spatial, p), scratch.y, c, nullptr, out, c);
  norm_relu(out, q * c, mixing.eps, stats + 2);
}

static void forward(const Mixing& mixing, int64_t first, int64_t last,
                    int64_t thread) {
  const Scratch scratch(mixing,
                        mixing.scratch + thread * mixing.scratch_floats);
  for (int64_t g = 0; g < mixing.groups; g++)
    for (int64_t n = first; n < last; n++) forward_one(mixing, n, g, scratch);
}

// From the gradient (rows, cols) of a full matrix to those of the factors.
INLINE void low_rank_backward(const Mixing& mixing, const LowRank& part,
                              int64_t n, int64_t g, int64_t thread,
                              int64_t rows, int64_t cols, const float* grad,
                              const Scratch& scratch) {
  if (!part.num) return;
  const int64_t rank = part.rank, depth = part.num * rank;
  const int64_t share = thread * mixing.groups + g;
  const float* const core = part.core.at(n, g);
  make_inner(part, core, part.right + g * depth * cols, cols, scratch.inner);
  transpose(depth, cols, scratch.inner, scratch.inner_t);
  float* const grad_left = part.grad_left + share * rows * depth;
  multiply(rows, depth, cols, plain(grad, cols), scratch.inner_t, depth,
           grad_left, grad_left, depth);
  float* const grad_inner = scratch.inner;
  multiply(depth, cols, rows, transposed(part.left + g * rows * depth, depth),
           grad, cols, nullptr, grad_inner, cols);
  float *const grad_core = part.grad_core.at(n, g),
               *const grad_right = part.grad_right + share * depth * cols;
  for (int64_t k = 0; k < part.num; k++) {
    const float* const inner_k = grad_inner + k * rank * cols;
    multiply(rank, rank, cols, plain(inner_k, cols),
             part.right_t + g * cols * depth + k * rank, depth, nullptr,
             grad_core + k * rank * rank, rank);
    float* const grad_right_k = grad_right + k * rank * cols;
    multiply(rank, cols, rank, transposed(core + k * rank * rank, rank),
             inner_k, cols, grad_right_k, grad_right_k, cols);
  }
}

INLINE void backward_one(const Mixing& mixing, int64_t n, int64_t g,
                         int64_t thread, const Scratch& scratch) {
  const int64_t p = mixing.points, c = mixing.width, q = mixing.rows;
  const float* const stats = mixing.stats.at(n, g);
  const float* const x = mixing.x.at(n, g);
  // What forward computed.
  const float* const channel =
      full_matrix(mixing.channel_part, n, g, c, c, mixing.channel.at(n, g),
                  scratch.inner, scratch.channel);
  const float* const spatial =
      full_matrix(mixing.spatial_part, n, g, q, p, mixing.spatial.at(n, g),
                  scratch.inner, scratch.spatial);
  float *const y = scratch.y, *const normed_y = scratch.normed_y;
  multiply(p, c, c, plain(x, c), channel, c, nullptr, normed_y, c);
  for (int64_t i = 0; i < p * c; i++) {
    const float v = (normed_y[i] - stats[0]) * stats[1];
    normed_y[i] = v;
    y[i] = v < 0 ? 0 : v;
  }
  float *const z = scratch.z, *const grad_z = scratch.grad_z;
  multiply(q, c, p, plain(spatial, p), y, c, nullptr, z, c);
  for (int64_t i = 0; i < q * c; i++) z[i] = (z[i] - stats[2]) * stats[3];
  // Spatial mixing.
  norm_relu_backward(mixing.grad_out.at(n, g), z, q * c, stats[3], grad_z);
  float* const grad_spatial = mixing.grad_spatial.at(n, g);
  transpose(p, c, y, scratch.turned);
  multiply(q, p, c, plain(grad_z, c), scratch.turned, p, nullptr, grad_spatial,
           p);
  float* const grad_y = y;
  multiply(p, c, q, transposed(spatial, p), grad_z, c, nullptr, grad_y, c);
  // Channel mixing.
  norm_relu_backward(grad_y, normed_y, p * c, stats[1], grad_y);
  float* const grad_channel = mixing.grad_channel.at(n, g);
  multiply(c, c, p, transposed(x, c), grad_y, c, nullptr, grad_channel, c);
  transpose(c, c, channel, scratch.turned);
  multiply(p, c, c, plain(grad_y, c), scratch.turned, c, nullptr,
           mixing.grad_x.at(n, g), c);
  low_rank_backward(mixing, mixing.channel_part, n, g, thread, c, c,
                    grad_channel, scratch);
  low_rank_backward(mixing, mixing.spatial_part, n, g, thread, q, p,
                    grad_spatial, scratch);
}

static void backward(const Mixing& mixing, int64_t first, int64_t last,
                     int64_t thread) {
  const Scratch scratch(mixing,
                        mixing.scratch + thread * mixing.scratch_floats);
  for (int64_t g = 0; g < mixing.groups; g++)
    for (int64_t n = first; n < last; n++)
      backward_one(mixing, n, g, thread, scratch);
}

}  // namespace KERNELS
