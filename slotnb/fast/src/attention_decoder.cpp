// The attention decoder's loss and its gradients, in single precision:
//   masks = softmax over slots of logits / temperature, recon = masks^T @ feats, loss = mean((recon - target)^2).
// The reconstruction error is kept for kBlock patches at a time instead of for all of them.
// Shapes: b images, k slots, n patches, d channels of the features (a multiple of 16).
#include "matmul.h"

namespace {

constexpr long kBlock = 64;  // patches

struct Scratch {
  float *masks, *d_masks;  // (k, kBlock)
  float* error;            // (kBlock, d)
  float* error_t;          // (d, kBlock)
  long divide_up(float* base, long k, long d) {
    return divide(base, {{&masks, k * kBlock}, {&d_masks, k * kBlock}, {&error, d * kBlock}, {&error_t, d * kBlock}});
  }
};

// One image: returns the sum of its squared errors, and writes the gradients of scale / 2 times that sum.
double image_mse(const float* feats, const float* logits, const float* target, long k, long n, long d,
                 float temperature, float scale, float* d_feats, float* d_logits, const Scratch& s) {
  double squares = 0;
  for (long start = 0; start < n; start += kBlock) {
    const long m = n - start < kBlock ? n - start : kBlock;
    const long padded = round_up(m, kLanes);
    for (long r = 0; r < k; ++r) {
      memcpy(s.masks + r * kBlock, logits + r * n + start, m * sizeof(float));
      memset(s.masks + r * kBlock + m, 0, (padded - m) * sizeof(float));
    }
    softmax_over_slots(s.masks, k, padded, kBlock, 1 / temperature);
    matmul(m, d, k, transpose_of(s.masks, kBlock), feats, d, {s.error, d});
    const float* want = target + start * d;
    Vec block_squares{};
    for (long j = 0; j < m * d; j += kLanes) {
      const Vec e = load(s.error + j) - load(want + j);
      block_squares += e * e;
      store(s.error + j, e * scale);
    }
    squares += sum(block_squares);
    matmul(k, d, m, rows_of(s.masks, kBlock), s.error, d, {d_feats, d, nullptr, start > 0});
    transpose(s.error, m, d, s.error_t, kBlock);
    matmul(k, padded, d, rows_of(feats, d), s.error_t, kBlock, {s.d_masks, kBlock});
    softmax_over_slots_backward(s.masks, s.d_masks, k, padded, kBlock, 1 / temperature);
    for (long r = 0; r < k; ++r)
      memcpy(d_logits + r * n + start, s.d_masks + r * kBlock, m * sizeof(float));
  }
  return squares;
}

}  // namespace

// Floats of scratch memory that `attention_decoder_mse` needs.
extern "C" long attention_decoder_scratch(long k, long d, long threads) {
  Scratch s;
  return threads * s.divide_up(nullptr, k, d);
}

// feats (b, k, d), logits (b, k, n), target (b, n, d) -> squares (b), the sums of squared errors, and the gradients
// of scale / 2 times their sum, d_feats (b, k, d) and d_logits (b, k, n). Each image is computed by one thread.
extern "C" void attention_decoder_mse(const float* feats, const float* logits, const float* target, double* squares,
                                      float* d_feats, float* d_logits, float* scratch, long b, long k, long n, long d,
                                      long threads, float temperature, float scale) {
  parallel_for(threads, threads, [=](long t) {
    Scratch s;
    const long size = s.divide_up(nullptr, k, d);
    s.divide_up(scratch + t * size, k, d);
    for (long i = b * t / threads; i < b * (t + 1) / threads; ++i) {
      squares[i] = image_mse(feats + i * k * d, logits + i * k * n, target + i * n * d, k, n, d, temperature, scale,
                             d_feats + i * k * d, d_logits + i * k * n, s);
    }
  });
}
