// Vector registers of single precision, and the elementwise functions that all kernels share.
// The width is chosen at compile time: AVX-512 (16 lanes) or AVX2 (8 lanes).
#pragma once

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <utility>

#define SLOTNB_INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int IntVec __attribute__((vector_size(kLanes * 4)));

SLOTNB_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

SLOTNB_INLINE void store(float* p, Vec v) {
  memcpy(p, &v, sizeof v);
}

SLOTNB_INLINE Vec broadcast(float x) {
  return x - Vec{};
}

SLOTNB_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i)
    total += v[i];
  return total;
}

// max(x, 0); NaN stays NaN.
SLOTNB_INLINE Vec relu(Vec x) {
  return x < Vec{} ? Vec{} : x;
}

// The gradient that passes a ReLU whose output is `y`; where y is NaN, it passes.
SLOTNB_INLINE Vec relu_backward(Vec y, Vec grad) {
  return y <= Vec{} ? Vec{} : grad;
}

// Cephes' expf: relative error below 2e-7, arguments clamped to [-87, 88]; NaN stays NaN.
SLOTNB_INLINE Vec exp(Vec x) {
  x = x < broadcast(-87.f) ? broadcast(-87.f) : x > broadcast(88.f) ? broadcast(88.f) : x;
  const Vec rounding = x < Vec{} ? broadcast(-.5f) : broadcast(.5f);
  const IntVec n = __builtin_convertvector(x * 1.44269504f + rounding, IntVec);
  const Vec m = __builtin_convertvector(n, Vec);
  const Vec f = x - m * .693359375f + m * 2.12194440e-4f;  // x - n log(2), in two parts
  Vec p = broadcast(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * f + c;
  }
  p = p * f * f + f + 1.f;
  return p * (Vec)((n + 127) << 23);
}

SLOTNB_INLINE Vec sigmoid(Vec x) {
  return 1.f / (1.f + exp(-x));
}

SLOTNB_INLINE Vec tanh(Vec x) {
  return 2.f * sigmoid(2.f * x) - 1.f;
}

static inline long round_up(long n, long multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Divides `base` into consecutive arrays of at least so many floats, each aligned to 16 floats.
// Returns the number of floats they need together.
struct Slice {
  float** to;
  long size;
};
static inline long divide(float* base, std::initializer_list<Slice> slices) {
  long used = 0;
  for (const Slice& slice : slices) {
    *slice.to = base + used;
    used += round_up(slice.size, 16);
  }
  return used;
}

// f(i) for i < n. The threads share the calls; f must not depend on how.
template <class F>
static void parallel_for(long threads, long n, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < n; ++i)
    f(i);
}

// Alternates elements of a and b, beginning at element `from` of both.
template <int from, int... i>
SLOTNB_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return Vec{(i % 2 ? b : a)[from + i / 2]...};
}

// x (rows, cols) -> to (cols, to_width), zero behind the first `rows` columns up to the next full register.
// cols and to_width are multiples of kLanes. A square of kLanes rows is transposed in registers by
// interleaving its upper with its lower half log2(kLanes) times.
static inline void transpose(const float* x, long rows, long cols, float* to, long to_width) {
  const std::make_integer_sequence<int, kLanes> lanes;
  for (long i0 = 0; i0 < rows; i0 += kLanes) {
    for (long j0 = 0; j0 < cols; j0 += kLanes) {
      Vec a[kLanes], b[kLanes];
      for (long i = 0; i < kLanes; ++i)
        a[i] = i0 + i < rows ? load(x + (i0 + i) * cols + j0) : Vec{};
      for (int step = 1; step < kLanes; step *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
          b[2 * i] = interleave<0>(a[i], a[i + kLanes / 2], lanes);
          b[2 * i + 1] = interleave<kLanes / 2>(a[i], a[i + kLanes / 2], lanes);
        }
        memcpy(a, b, sizeof a);
      }
      for (long j = 0; j < kLanes; ++j)
        store(to + (j0 + j) * to_width + i0, a[j]);
    }
  }
}

// logits (k, n), rows `width` apart -> softmax over k of scale * logits, in place. n is a multiple of kLanes.
static inline void softmax_over_slots(float* logits, long k, long n, long width, float scale = 1) {
  for (long j = 0; j < n; j += kLanes, logits += kLanes) {
    Vec top = load(logits) * scale, total{};
    for (long r = 1; r < k; ++r) {
      const Vec x = load(logits + r * width) * scale;
      top = x > top ? x : top;
    }
    for (long r = 0; r < k; ++r) {
      const Vec e = exp(load(logits + r * width) * scale - top);
      total += e;
      store(logits + r * width, e);
    }
    total = 1.f / total;
    for (long r = 0; r < k; ++r)
      store(logits + r * width, load(logits + r * width) * total);
  }
}

// grad (k, n), of the softmax `probs` (k, n) -> that of the logits, in place.
static inline void softmax_over_slots_backward(const float* probs, float* grad, long k, long n, long width,
                                               float scale = 1) {
  for (long j = 0; j < n; j += kLanes, probs += kLanes, grad += kLanes) {
    Vec dot{};
    for (long r = 0; r < k; ++r)
      dot += load(probs + r * width) * load(grad + r * width);
    for (long r = 0; r < k; ++r) {
      store(grad + r * width, load(probs + r * width) * (load(grad + r * width) - dot) * scale);
    }
  }
}
