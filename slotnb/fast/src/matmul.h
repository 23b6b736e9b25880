// Products of small matrices that stay in the caches. Each element is summed over the inner axis in order,
// whatever the tile it belongs to, so results do not depend on how rows are shared among threads.
#pragma once

#include "registers.h"

#ifdef __AVX512F__
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 sums stay in the 32 registers
#else
constexpr int kTileRows = 4, kTileVecs = 3;  // 12 sums stay in the 16 registers
#endif

// A matrix whose element (i, j) lies at data[i * row + j * col].
struct View {
  const float* data;
  long row, col;
};

// data (rows, width), row by row.
static inline View rows_of(const float* data, long width) {
  return {data, width, 1};
}

// The transpose of data (rows, width).
static inline View transpose_of(const float* data, long width) {
  return {data, 1, width};
}

// Where a product goes: to data (m, width), beginning with the bias (width) or with what is there.
struct Output {
  float* data;
  long width;
  const float* bias = nullptr;
  bool accumulate = false;
};

template <int rows, int vecs>
static void matmul_tile(long inner, View a, const float* b, long b_width, const Output& out, long i, long j) {
  Vec sums[rows][vecs];
  float* c = out.data + i * out.width + j;
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vecs; ++v) {
      sums[r][v] = out.accumulate ? load(c + r * out.width + v * kLanes)
                   : out.bias     ? load(out.bias + j + v * kLanes)
                                  : Vec{};
    }
  }
  const float* left = a.data + i * a.row;
  b += j;
  for (long q = 0; q < inner; ++q, left += a.col, b += b_width) {
    Vec right[vecs];
    for (int v = 0; v < vecs; ++v)
      right[v] = load(b + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const Vec x = broadcast(left[r * a.row]);
      for (int v = 0; v < vecs; ++v)
        sums[r][v] += x * right[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vecs; ++v)
      store(c + r * out.width + v * kLanes, sums[r][v]);
  }
}

template <int rows>
static void matmul_rows(long n, long inner, View a, const float* b, long b_width, const Output& out, long i) {
  long j = 0;
  for (; j + kTileVecs * kLanes <= n; j += kTileVecs * kLanes) {
    matmul_tile<rows, kTileVecs>(inner, a, b, b_width, out, i, j);
  }
  for (; j < n; j += kLanes)
    matmul_tile<rows, 1>(inner, a, b, b_width, out, i, j);
}

// out (m, n) = a (m, inner) @ b (inner, n), rows of b `b_width` apart; n is a multiple of kLanes.
static inline void matmul(long m, long n, long inner, View a, const float* b, long b_width, const Output& out) {
  const long tiles = (m + kTileRows - 1) / kTileRows;
  for (long tile = 0, i = 0; tile < tiles; ++tile) {
    const long height = m / tiles + (tile < m % tiles);  // tiles of one height, or nearly
    switch (height) {
      case 1:
        matmul_rows<1>(n, inner, a, b, b_width, out, i);
        break;
      case 2:
        matmul_rows<2>(n, inner, a, b, b_width, out, i);
        break;
      case 3:
        matmul_rows<3>(n, inner, a, b, b_width, out, i);
        break;
      case 4:
        matmul_rows<4>(n, inner, a, b, b_width, out, i);
        break;
#ifdef __AVX512F__
      case 5:
        matmul_rows<5>(n, inner, a, b, b_width, out, i);
        break;
      case 6:
        matmul_rows<6>(n, inner, a, b, b_width, out, i);
        break;
#endif
    }
    i += height;
  }
}
