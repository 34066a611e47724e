// Small dense products in float32, transposes, and the rotation of the packed format.
#pragma once
#include "format.h"
#include "vec.h"

namespace tqc {

constexpr int GEMM_ROWS = W == 16 ? 8 : W == 8 ? 6 : 4;

template <int M, int V>
inline void gemm_block(float* c, int ldc, const float* a, int lda, const float* b, int ldb, int depth, bool add) {
  vf sum[M][V];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < V; ++j) sum[i][j] = add ? load(c + i * ldc + j * W) : vf{};
  for (int k = 0; k < depth; ++k) {
    vf right[V];
    for (int j = 0; j < V; ++j) right[j] = load(b + k * ldb + j * W);
    for (int i = 0; i < M; ++i) {
      vf left = splat(a[i * lda + k]);
      for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * W, sum[i][j]);
}

template <int M>
inline void gemm_rows(float* c, int ldc, const float* a, int lda, const float* b, int ldb, int cols, int depth,
                      bool add) {
  int j = 0;
  for (; j + 2 * W <= cols; j += 2 * W) gemm_block<M, 2>(c + j, ldc, a, lda, b + j, ldb, depth, add);
  for (; j < cols; j += W) gemm_block<M, 1>(c + j, ldc, a, lda, b + j, ldb, depth, add);
}

// c[rows, cols] (+)= a[rows, depth] b[depth, cols]; cols is a multiple of PAD.
inline void gemm(float* c, int ldc, const float* a, int lda, const float* b, int ldb, int rows, int cols, int depth,
                 bool add) {
  int i = 0;
  for (; i + GEMM_ROWS <= rows; i += GEMM_ROWS)
    gemm_rows<GEMM_ROWS>(c + i * ldc, ldc, a + i * lda, lda, b, ldb, cols, depth, add);
  float* ci = c + i * ldc;
  const float* ai = a + i * lda;
  switch (rows - i) {
    case 1: return gemm_rows<1>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    case 2: return gemm_rows<2>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    case 3: return gemm_rows<3>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    case 4: return gemm_rows<4>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    case 5: return gemm_rows<5>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    case 6: return gemm_rows<6>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    case 7: return gemm_rows<7>(ci, ldc, ai, lda, b, ldb, cols, depth, add);
    default: return;
  }
}

inline float dot(const float* a, const float* b, int padded_n) {
  vf sum{};
  for (int i = 0; i < padded_n; i += W) sum += load(a + i) * load(b + i);
  return hsum(sum);
}

// Transposes by perfect shuffles: log2(n) rounds of interleaving row i with row i + n/2.
template <class V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * int(sizeof...(I)))...);
}
template <class V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + I / 2 + (I % 2) * n)...);
}
template <class V, int N>
inline void transpose_square(V (&rows)[N]) {
  using Lanes = std::make_integer_sequence<int, N>;
  V next[N];
  for (int round = 1; round < N; round *= 2) {
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + N / 2], Lanes{});
      next[2 * i + 1] = interleave_high(rows[i], rows[i + N / 2], Lanes{});
    }
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}

// out[cols, 32] = in[32, cols] for bytes; cols and ld are multiples of 16.
inline void transpose_bytes(uint8_t* out, const uint8_t* in, int ld, int cols) {
  for (int half = 0; half < 32; half += 16)
    for (int c = 0; c < cols; c += 16) {
      b16 rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = load_as<b16>(in + (half + i) * ld + c);
      transpose_square<b16, 16>(rows);
      for (int i = 0; i < 16; ++i) memcpy(out + (c + i) * 32 + half, &rows[i], 16);
    }
}
// out[cols, 32] = in[32, cols] for floats; cols and ld are multiples of PAD.
inline void transpose_floats(float* out, const float* in, int ld, int cols) {
  for (int t = 0; t < 32; t += W)
    for (int c = 0; c < cols; c += W) {
      vf rows[W];
      for (int i = 0; i < W; ++i) rows[i] = load(in + (t + i) * ld + c);
      transpose_square<vf, W>(rows);
      for (int i = 0; i < W; ++i) store(out + (c + i) * 32 + t, rows[i]);
    }
}

// Sums of the lanes of W vectors, lane i that of x[i], by folding and interleaving.
template <int n = W>
inline vf lane_sums(vf* x) {
  using Lanes = std::make_integer_sequence<int, W>;
  if constexpr (n == 1) {
    return x[0];
  } else {
    for (int i = 0; i < n / 2; ++i)
      x[i] = interleave_low(x[i], x[i + n / 2], Lanes{}) + interleave_high(x[i], x[i + n / 2], Lanes{});
    return lane_sums<n / 2>(x);
  }
}

// out[rows, cols] = a[rows, depth] b[cols, depth]', at each turn as many columns as make W sums.
template <int rows>
inline void gemm_transposed_rows(float* out, int ldo, const float* a, const float* b, int ld, int depth, int cols) {
  constexpr int columns = W / (rows == 3 ? 4 : rows);
  for (int c = 0; c < cols; c += columns) {
    vf sum[W] = {};
    for (int i = 0; i < depth; i += W) {
      vf right[columns];
      for (int j = 0; j < columns; ++j) right[j] = load(b + (c + j) * ld + i);
      for (int r = 0; r < rows; ++r) {
        const vf left = load(a + r * ld + i);
        for (int j = 0; j < columns; ++j) sum[r * columns + j] += left * right[j];
      }
    }
    const vf sums = lane_sums(sum);
    for (int r = 0; r < rows; ++r) memcpy(out + r * ldo + c, (const char*)&sums + 4 * r * columns, 4 * columns);
  }
}

// out[rows, cols] = a[rows, depth] b[32, depth]'; depth and ld are multiples of PAD, cols is rounded up to W. For
// few rows, where a transpose of b would cost more than it saves.
inline void gemm_transposed(float* out, int ldo, const float* a, const float* b, int ld, int rows, int depth, int cols) {
  for (; rows > 0; rows -= 4, out += 4 * ldo, a += 4 * ld) {
    switch (rows) {
      case 1: gemm_transposed_rows<1>(out, ldo, a, b, ld, depth, cols); break;
      case 2: gemm_transposed_rows<2>(out, ldo, a, b, ld, depth, cols); break;
      case 3: gemm_transposed_rows<3>(out, ldo, a, b, ld, depth, cols); break;
      default: gemm_transposed_rows<4>(out, ldo, a, b, ld, depth, cols);
    }
  }
}

// Each row of [rows, padded_n] times `by`, or through it; `out` may be `in`.
inline void multiply_rows(float* out, const float* in, int rows, const float* by, int padded_n) {
  for (int r = 0; r < rows; ++r, out += padded_n, in += padded_n)
    for (int i = 0; i < padded_n; i += W) store(out + i, load(in + i) * load(by + i));
}
inline void divide_rows(float* x, int rows, const float* by, int padded_n) {
  for (int r = 0; r < rows; ++r, x += padded_n)
    for (int i = 0; i < padded_n; i += W) store(x + i, load(x + i) / load(by + i));
}

// One butterfly of lanes i and i ^ step, and those of twice the step and more.
template <int step, int... I>
inline vf butterflies(vf v, std::integer_sequence<int, I...> lanes) {
  if constexpr (step == W) {
    return v;
  } else {
    const vf sign = {(I & step ? -1.0f : 1.0f)...};
    return butterflies<2 * step>(__builtin_shufflevector(v, v, (I ^ step)...) + v * sign, lanes);
  }
}

// Butterflies between `vectors` vectors `step` apart, then between their sums and differences, and so on.
template <int vectors>
inline void butterflies(float* x, int step) {
  vf v[vectors];
  for (int i = 0; i < vectors; ++i) v[i] = load(x + i * step);
  for (int half = 1; half < vectors; half *= 2)
    for (int i = 0; i < vectors; ++i)
      if (!(i & half)) {
        const vf a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
  for (int i = 0; i < vectors; ++i) store(x + i * step, v[i]);
}

// Walsh-Hadamard transform in place, not scaled; n is a power of two and a multiple of PAD.
inline void hadamard(float* x, int n) {
  for (int i = 0; i < n; i += W) store(x + i, butterflies<1>(load(x + i), std::make_integer_sequence<int, W>{}));
  for (int step = W, vectors; step < n; step *= vectors) {
    vectors = std::min(8, n / step);  // what the registers hold
    for (int block = 0; block < n; block += vectors * step)
      for (int i = block; i < block + step; i += W) {
        if (vectors == 8) butterflies<8>(x + i, step);
        else if (vectors == 4) butterflies<4>(x + i, step);
        else butterflies<2>(x + i, step);
      }
  }
}

// out = R in for each row; both [rows, padded(dim)], not the same memory. A copy in folded formats.
inline void rotate_rows(float* out, const float* in, int rows, const Format& f) {
  const int ld = padded(f.dim);
  if (f.folded) return (void)memcpy(out, in, sizeof(float) * rows * ld);
  if (!f.signs) return gemm(out, ld, in, ld, f.rotation_t, ld, rows, ld, f.dim, false);
  const vf factor = splat(f.hadamard_scale);
  for (int r = 0; r < rows; ++r, out += ld, in += ld) {
    for (int i = 0; i < ld; i += W) store(out + i, load(in + i) * load(f.signs + i));
    hadamard(out, f.dim);
    for (int i = 0; i < ld; i += W) store(out + i, load(out + i) * factor);
  }
}

// out = R' in in the same way, and in centred formats times `balance`.
inline void unrotate_rows(float* out, const float* in, int rows, const Format& f, const float* balance) {
  const int ld = padded(f.dim);
  if (f.folded || !f.signs) {
    if (f.folded) memcpy(out, in, sizeof(float) * rows * ld);
    else gemm(out, ld, in, ld, f.rotation, ld, rows, ld, f.dim, false);
    if (f.centred) multiply_rows(out, out, rows, balance, ld);
    return;
  }
  float last[MAX_HEAD_DIM];
  for (int i = 0; i < ld; i += W) store(last + i, f.centred ? load(f.signs + i) * load(balance + i) : load(f.signs + i));
  const vf factor = splat(f.hadamard_scale);
  for (int r = 0; r < rows; ++r, out += ld, in += ld) {
    memcpy(out, in, sizeof(float) * ld);
    hadamard(out, f.dim);
    for (int i = 0; i < ld; i += W) store(out + i, load(out + i) * factor * load(last + i));
  }
}

}  // namespace tqc
