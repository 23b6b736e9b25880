// The iterations of slot attention (Locatello et al. 2020, Algorithm 1), forward and backward, in single precision.
// Shapes: b images, k slots, n patches, d channels of slots and patches, h hidden units of the residual MLP;
// d and h are multiples of 16. As in slotnb.slot_attention, the key weight is applied to the queries and the value
// weight to the means, so that patches are read as they are.
//
// Images are independent but for the gradients of the weights. Threads share the images first, and then the rows of
// the weights' gradients, each of which is summed over all iterations and images in one order.
#include "matmul.h"

namespace {

// The order of the parameters; as in PyTorch, weights of linear layers are (out, in), those of the GRU's gates (3 d,
// d).
enum Parameter {
  kNormSlotsWeight,
  kNormSlotsBias,
  kToQ,
  kToK,
  kToV,
  kGruInputWeight,
  kGruHiddenWeight,
  kGruInputBias,
  kGruHiddenBias,
  kNormMlpWeight,
  kNormMlpBias,
  kMlpInWeight,
  kMlpInBias,
  kMlpOutWeight,
  kMlpOutBias,
};

struct Sizes {
  long b, k, n, d, h, iters;
  long rows() const { return b * k; }                  // slots of all images
  long all_rows() const { return iters * rows(); }     // and of all iterations
  long padded() const { return round_up(n, kLanes); }  // row length of (k, n) matrices
};

// What the backward pass needs; each array has all iterations, and in each all images: (iters, b, k, ...).
struct Saved {
  float* slots;                // (d) at the beginning of the iteration
  float *normed, *scaled;      // (d) norm_slots(slots), before and after scale and shift
  float *query, *query_key;    // (d) to_q(scaled), and query @ to_k * scale
  float *mean, *value;         // (d) weighted mean of the patches, and to_v(mean)
  float *hidden_new, *update;  // (d) the GRU's hidden part of the new state, and the new state
  float *mlp_normed, *mlp_in;  // (d) norm_mlp of the GRU's output, before and after scale and shift
  float* gates;                // (2 d) reset and update gates of the GRU
  float* mlp_hidden;           // (h) after the ReLU
  float *attn, *weights;       // (padded n) softmax over slots, and normalized over patches
  float *rstd, *mlp_rstd;      // () of the LayerNorms
  float* total;                // () sum of attn + eps over patches
  long divide_up(float* base, const Sizes& z) {
    const long t = z.all_rows(), d = z.d, n = z.padded();
    return divide(base, {{&slots, t * d},
                         {&normed, t * d},
                         {&scaled, t * d},
                         {&query, t * d},
                         {&query_key, t * d},
                         {&mean, t * d},
                         {&value, t * d},
                         {&hidden_new, t * d},
                         {&update, t * d},
                         {&mlp_normed, t * d},
                         {&mlp_in, t * d},
                         {&gates, t * 2 * d},
                         {&mlp_hidden, t * z.h},
                         {&attn, t * n},
                         {&weights, t * n},
                         {&rstd, t},
                         {&mlp_rstd, t},
                         {&total, t}});
  }
};

// Transposed patches (b, d, padded n) and weights (in, out), and the GRU's gates before the nonlinearity (b, k, 3 d).
struct ForwardScratch {
  float *patches_t, *to_q_t, *to_v_t, *gru_input_t, *gru_hidden_t, *mlp_in_t, *mlp_out_t, *input_gates, *hidden_gates;
  long divide_up(float* base, const Sizes& z) {
    const long d = z.d;
    return divide(base, {{&patches_t, z.b * d * z.padded()},
                         {&to_q_t, d * d},
                         {&to_v_t, d * d},
                         {&gru_input_t, 3 * d * d},
                         {&gru_hidden_t, 3 * d * d},
                         {&mlp_in_t, d * z.h},
                         {&mlp_out_t, d * z.h},
                         {&input_gates, z.rows() * 3 * d},
                         {&hidden_gates, z.rows() * 3 * d}});
  }
};

// Gradients of what is saved, for all iterations where the gradient of a weight needs them.
struct BackwardScratch {
  float *patches_t, *to_k_t;                                  // (b, d, padded n), (d, d)
  float *d_out, *d_mlp_in, *d_value, *d_query_key, *d_query;  // (iters, b, k, d)
  float* d_scaled;                                            // (iters, b, k, d)
  float* d_mlp_hidden;                                        // (iters, b, k, h)
  float *d_input_gates, *d_hidden_gates;                      // (iters, b, k, 3 d)
  float *d_gru, *d_mean;                                      // (b, k, d)
  float* d_attn;                                              // (b, k, padded n)
  long divide_up(float* base, const Sizes& z) {
    const long t = z.all_rows(), d = z.d;
    return divide(base, {{&patches_t, z.b * d * z.padded()},
                         {&to_k_t, d * d},
                         {&d_out, t * d},
                         {&d_mlp_in, t * d},
                         {&d_value, t * d},
                         {&d_query_key, t * d},
                         {&d_query, t * d},
                         {&d_scaled, t * d},
                         {&d_mlp_hidden, t * z.h},
                         {&d_input_gates, t * 3 * d},
                         {&d_hidden_gates, t * 3 * d},
                         {&d_gru, z.rows() * d},
                         {&d_mean, z.rows() * d},
                         {&d_attn, z.rows() * z.padded()}});
  }
};

// LayerNorm of x (rows, d): `normed` is before scale and shift, `out` after.
void layer_norm(const float* x, long rows, long d, float eps, const float* weight, const float* bias, float* normed,
                float* rstd, float* out) {
  for (long r = 0; r < rows; ++r, x += d, normed += d, out += d) {
    Vec total{}, squares{};
    for (long c = 0; c < d; c += kLanes)
      total += load(x + c);
    const float mean = sum(total) / d;
    for (long c = 0; c < d; c += kLanes) {
      const Vec y = load(x + c) - mean;
      squares += y * y;
    }
    rstd[r] = 1 / std::sqrt(sum(squares) / d + eps);
    for (long c = 0; c < d; c += kLanes) {
      const Vec y = (load(x + c) - mean) * rstd[r];
      store(normed + c, y);
      store(out + c, y * load(weight + c) + load(bias + c));
    }
  }
}

// Adds the gradient of LayerNorm's input to d_x (rows, d); grad (rows, d) is that of its output.
void layer_norm_backward(const float* grad, long rows, long d, const float* weight, const float* normed,
                         const float* rstd, float* d_x) {
  for (long r = 0; r < rows; ++r, grad += d, normed += d, d_x += d) {
    Vec total{}, dot{};
    for (long c = 0; c < d; c += kLanes) {
      const Vec y = load(grad + c) * load(weight + c);
      total += y;
      dot += y * load(normed + c);
    }
    const float a = sum(total) / d, b = sum(dot) / d;
    for (long c = 0; c < d; c += kLanes) {
      const Vec y = load(grad + c) * load(weight + c) - a - load(normed + c) * b;
      store(d_x + c, load(d_x + c) + y * rstd[r]);
    }
  }
}

// to (d) = the sum over rows of x (rows, d), or of x * factor.
void sum_rows(const float* x, const float* factor, long rows, long d, float* to) {
  for (long c = 0; c < d; c += kLanes) {
    Vec total{};
    for (long r = 0; r < rows; ++r) {
      const Vec y = load(x + r * d + c);
      total += factor ? y * load(factor + r * d + c) : y;
    }
    store(to + c, total);
  }
}

void scale_all(float* x, long size, float scale) {
  for (long j = 0; j < size; j += kLanes)
    store(x + j, load(x + j) * scale);
}

// Images [first, last).
void forward_images(const Sizes& z, const float* x, const float* start, const float* const* params, float* out,
                    float* logits, const Saved& saved, const ForwardScratch& scratch, float scale, float norm_eps,
                    float attn_eps, long first, long last) {
  const long d = z.d, h = z.h, k = z.k, n = z.n, padded = z.padded(), rows = (last - first) * k;
  const float* patches = x + first * n * d;
  float* patches_t = scratch.patches_t + first * d * padded;
  float* input_gates = scratch.input_gates + first * k * 3 * d;
  float* hidden_gates = scratch.hidden_gates + first * k * 3 * d;
  for (long i = 0; i < last - first; ++i)
    transpose(patches + i * n * d, n, d, patches_t + i * d * padded, padded);
  memcpy(saved.slots + first * k * d, start + first * k * d, rows * d * sizeof(float));
  for (long t = 0; t < z.iters; ++t) {
    const long row = t * z.rows() + first * k;
    const float* slots = saved.slots + row * d;
    float* next = t + 1 < z.iters ? saved.slots + (row + z.rows()) * d : out + first * k * d;
    float *attn = saved.attn + row * padded, *weights = saved.weights + row * padded;

    // Queries and logits
    layer_norm(slots, rows, d, norm_eps, params[kNormSlotsWeight], params[kNormSlotsBias], saved.normed + row * d,
               saved.rstd + row, saved.scaled + row * d);
    float *query = saved.query + row * d, *query_key = saved.query_key + row * d;
    matmul(rows, d, d, rows_of(saved.scaled + row * d, d), scratch.to_q_t, d, {query, d});
    matmul(rows, d, d, rows_of(query, d), params[kToK], d, {query_key, d});
    scale_all(query_key, rows * d, scale);
    for (long i = 0; i < last - first; ++i) {
      matmul(k, padded, d, rows_of(query_key + i * k * d, d), patches_t + i * d * padded, padded,
             {attn + i * k * padded, padded});
    }
    if (t + 1 == z.iters) {
      for (long r = 0; r < rows; ++r) {
        memcpy(logits + (first * k + r) * n, attn + r * padded, n * sizeof(float));
      }
    }

    // Softmax over slots, weighted mean over patches
    for (long i = 0; i < last - first; ++i)
      softmax_over_slots(attn + i * k * padded, k, padded, padded);
    for (long r = 0; r < rows; ++r) {
      float* weight = weights + r * padded;
      for (long j = 0; j < padded; j += kLanes)
        store(weight + j, load(attn + r * padded + j) + attn_eps);
      for (long j = n; j < padded; ++j)
        weight[j] = 0;
      Vec total{};
      for (long j = 0; j < padded; j += kLanes)
        total += load(weight + j);
      saved.total[row + r] = sum(total);
      for (long j = 0; j < padded; j += kLanes)
        store(weight + j, load(weight + j) / saved.total[row + r]);
    }
    float *mean = saved.mean + row * d, *value = saved.value + row * d;
    for (long i = 0; i < last - first; ++i) {
      matmul(k, d, n, rows_of(weights + i * k * padded, padded), patches + i * n * d, d, {mean + i * k * d, d});
    }
    matmul(rows, d, d, rows_of(mean, d), scratch.to_v_t, d, {value, d});

    // GRU
    matmul(rows, 3 * d, d, rows_of(value, d), scratch.gru_input_t, 3 * d, {input_gates, 3 * d, params[kGruInputBias]});
    matmul(rows, 3 * d, d, rows_of(slots, d), scratch.gru_hidden_t, 3 * d,
           {hidden_gates, 3 * d, params[kGruHiddenBias]});
    for (long r = 0; r < rows; ++r) {
      for (long c = 0; c < d; c += kLanes) {
        const float *input = input_gates + r * 3 * d + c, *hidden = hidden_gates + r * 3 * d + c;
        float* gates = saved.gates + (row + r) * 2 * d + c;
        const Vec reset = sigmoid(load(input) + load(hidden));
        const Vec keep = sigmoid(load(input + d) + load(hidden + d));
        const Vec hidden_new = load(hidden + 2 * d);
        const Vec update = tanh(load(input + 2 * d) + reset * hidden_new);
        store(gates, reset);
        store(gates + d, keep);
        store(saved.hidden_new + (row + r) * d + c, hidden_new);
        store(saved.update + (row + r) * d + c, update);
        store(next + r * d + c, update + keep * (load(slots + r * d + c) - update));
      }
    }

    // Residual MLP
    float *mlp_in = saved.mlp_in + row * d, *mlp_hidden = saved.mlp_hidden + row * h;
    layer_norm(next, rows, d, norm_eps, params[kNormMlpWeight], params[kNormMlpBias], saved.mlp_normed + row * d,
               saved.mlp_rstd + row, mlp_in);
    matmul(rows, h, d, rows_of(mlp_in, d), scratch.mlp_in_t, h, {mlp_hidden, h, params[kMlpInBias]});
    for (long j = 0; j < rows * h; j += kLanes)
      store(mlp_hidden + j, relu(load(mlp_hidden + j)));
    matmul(rows, d, h, rows_of(mlp_hidden, h), scratch.mlp_out_t, d, {next, d, nullptr, true});
    for (long r = 0; r < rows; ++r) {
      for (long c = 0; c < d; c += kLanes) {
        store(next + r * d + c, load(next + r * d + c) + load(params[kMlpOutBias] + c));
      }
    }
  }
}

// Images [first, last): gradients of patches and initial slots, and of what the weights' gradients are made of.
void backward_images(const Sizes& z, const float* x, const float* const* params, const Saved& saved,
                     const float* d_slots, const float* d_logits, const BackwardScratch& scratch, float* d_x,
                     float* d_start, float scale, long first, long last) {
  const long d = z.d, h = z.h, k = z.k, n = z.n, padded = z.padded(), rows = (last - first) * k;
  const float* patches = x + first * n * d;
  float* patches_t = scratch.patches_t + first * d * padded;
  for (long i = 0; i < last - first; ++i)
    transpose(patches + i * n * d, n, d, patches_t + i * d * padded, padded);
  float* grad = d_start + first * k * d;  // of the slots behind the iteration, at last of the initial ones
  if (d_slots) {
    memcpy(grad, d_slots + first * k * d, rows * d * sizeof(float));
  } else {
    memset(grad, 0, rows * d * sizeof(float));
  }
  d_x += first * n * d;
  memset(d_x, 0, (last - first) * n * d * sizeof(float));
  for (long t = z.iters - 1; t >= 0; --t) {
    const long row = t * z.rows() + first * k;
    const float* slots = saved.slots + row * d;

    // Residual MLP
    float *d_mlp_hidden = scratch.d_mlp_hidden + row * h, *d_mlp_in = scratch.d_mlp_in + row * d;
    float* d_gru = scratch.d_gru + first * k * d;
    memcpy(scratch.d_out + row * d, grad, rows * d * sizeof(float));
    matmul(rows, h, d, rows_of(grad, d), params[kMlpOutWeight], h, {d_mlp_hidden, h});
    for (long j = 0; j < rows * h; j += kLanes) {
      store(d_mlp_hidden + j, relu_backward(load(saved.mlp_hidden + row * h + j), load(d_mlp_hidden + j)));
    }
    matmul(rows, d, h, rows_of(d_mlp_hidden, h), params[kMlpInWeight], d, {d_mlp_in, d});
    memcpy(d_gru, grad, rows * d * sizeof(float));
    layer_norm_backward(d_mlp_in, rows, d, params[kNormMlpWeight], saved.mlp_normed + row * d, saved.mlp_rstd + row,
                        d_gru);

    // GRU
    float* d_input_gates = scratch.d_input_gates + row * 3 * d;
    float* d_hidden_gates = scratch.d_hidden_gates + row * 3 * d;
    for (long r = 0; r < rows; ++r) {
      for (long c = 0; c < d; c += kLanes) {
        const float* gates = saved.gates + (row + r) * 2 * d + c;
        float *d_input = d_input_gates + r * 3 * d + c, *d_hidden = d_hidden_gates + r * 3 * d + c;
        const Vec reset = load(gates), keep = load(gates + d);
        const Vec update = load(saved.update + (row + r) * d + c), y = load(d_gru + r * d + c);
        const Vec d_new = y * (1.f - keep) * (1.f - update * update);
        const Vec d_reset = d_new * load(saved.hidden_new + (row + r) * d + c) * reset * (1.f - reset);
        const Vec d_keep = y * (load(slots + r * d + c) - update) * keep * (1.f - keep);
        store(d_input, d_reset);
        store(d_hidden, d_reset);
        store(d_input + d, d_keep);
        store(d_hidden + d, d_keep);
        store(d_input + 2 * d, d_new);
        store(d_hidden + 2 * d, d_new * reset);
        store(grad + r * d + c, y * keep);
      }
    }
    matmul(rows, d, 3 * d, rows_of(d_hidden_gates, 3 * d), params[kGruHiddenWeight], d, {grad, d, nullptr, true});

    // Weighted mean over patches, softmax over slots
    const float *attn = saved.attn + row * padded, *weights = saved.weights + row * padded;
    float *d_value = scratch.d_value + row * d, *d_mean = scratch.d_mean + first * k * d;
    float* d_attn = scratch.d_attn + first * k * padded;
    matmul(rows, d, 3 * d, rows_of(d_input_gates, 3 * d), params[kGruInputWeight], d, {d_value, d});
    matmul(rows, d, d, rows_of(d_value, d), params[kToV], d, {d_mean, d});
    for (long i = 0; i < last - first; ++i) {
      matmul(k, padded, d, rows_of(d_mean + i * k * d, d), patches_t + i * d * padded, padded,
             {d_attn + i * k * padded, padded});
    }
    for (long r = 0; r < rows; ++r) {
      float* to = d_attn + r * padded;
      Vec products{};
      for (long j = 0; j < padded; j += kLanes)
        products += load(to + j) * load(weights + r * padded + j);
      const float dot = sum(products), inverse = 1 / saved.total[row + r];
      for (long j = 0; j < padded; j += kLanes)
        store(to + j, (load(to + j) - dot) * inverse);
    }
    for (long i = 0; i < last - first; ++i) {
      softmax_over_slots_backward(attn + i * k * padded, d_attn + i * k * padded, k, padded, padded);
    }
    if (d_logits && t + 1 == z.iters) {
      for (long r = 0; r < rows; ++r) {
        for (long j = 0; j < n; ++j)
          d_attn[r * padded + j] += d_logits[(first * k + r) * n + j];
      }
    }

    // Queries and patches; d_attn is now the gradient of the logits
    float *d_query_key = scratch.d_query_key + row * d, *d_query = scratch.d_query + row * d;
    float* d_scaled = scratch.d_scaled + row * d;
    for (long i = 0; i < last - first; ++i) {
      const long s = i * k;
      matmul(k, d, n, rows_of(d_attn + s * padded, padded), patches + i * n * d, d, {d_query_key + s * d, d});
      const Output to_patches{d_x + i * n * d, d, nullptr, true};
      matmul(n, d, k, transpose_of(weights + s * padded, padded), d_mean + s * d, d, to_patches);
      matmul(n, d, k, transpose_of(d_attn + s * padded, padded), saved.query_key + (row + s) * d, d, to_patches);
    }
    scale_all(d_query_key, rows * d, scale);
    matmul(rows, d, d, rows_of(d_query_key, d), scratch.to_k_t, d, {d_query, d});
    matmul(rows, d, d, rows_of(d_query, d), params[kToQ], d, {d_scaled, d});
    layer_norm_backward(d_scaled, rows, d, params[kNormSlotsWeight], saved.normed + row * d, saved.rstd + row, grad);
  }
}

}  // namespace

extern "C" {

// Floats of scratch memory that the forward (backward = 0) or the backward pass needs.
long slot_attention_scratch(long b, long k, long n, long d, long h, long iters, long backward) {
  const Sizes z{b, k, n, d, h, iters};
  ForwardScratch forward_scratch;
  BackwardScratch backward_scratch;
  return backward ? backward_scratch.divide_up(nullptr, z) : forward_scratch.divide_up(nullptr, z);
}

// x (b, n, d) normalized patches, start (b, k, d) initial slots -> slots (b, k, d), logits (b, k, n) of the last
// iteration. `scale` multiplies the logits.
void slot_attention_forward(const float* x, const float* start, const float* const* params, float* slots, float* logits,
                            float* saved_memory, float* scratch_memory, long b, long k, long n, long d, long h,
                            long iters, long threads, float scale, float norm_eps, float attn_eps) {
  const Sizes z{b, k, n, d, h, iters};
  Saved saved;
  saved.divide_up(saved_memory, z);
  ForwardScratch scratch;
  scratch.divide_up(scratch_memory, z);
  transpose(params[kToQ], d, d, scratch.to_q_t, d);
  transpose(params[kToV], d, d, scratch.to_v_t, d);
  transpose(params[kGruInputWeight], 3 * d, d, scratch.gru_input_t, 3 * d);
  transpose(params[kGruHiddenWeight], 3 * d, d, scratch.gru_hidden_t, 3 * d);
  transpose(params[kMlpInWeight], h, d, scratch.mlp_in_t, h);
  transpose(params[kMlpOutWeight], d, h, scratch.mlp_out_t, d);
  const long parts = threads < b ? threads : b;
  parallel_for(parts, parts, [&](long t) {
    forward_images(z, x, start, params, slots, logits, saved, scratch, scale, norm_eps, attn_eps, b * t / parts,
                   b * (t + 1) / parts);
  });
}

// d_slots (b, k, d) and d_logits (b, k, n), each of which may be null -> d_x (b, n, d), d_start (b, k, d) and the
// gradients of the parameters, in their order and shapes.
void slot_attention_backward(const float* x, const float* const* params, float* saved_memory, const float* d_slots,
                             const float* d_logits, float* d_x, float* d_start, float* const* d_params,
                             float* scratch_memory, long b, long k, long n, long d, long h, long iters, long threads,
                             float scale) {
  const Sizes z{b, k, n, d, h, iters};
  Saved saved;
  saved.divide_up(saved_memory, z);
  BackwardScratch s;
  s.divide_up(scratch_memory, z);
  transpose(params[kToK], d, d, s.to_k_t, d);
  const long parts = threads < b ? threads : b;
  parallel_for(parts, parts, [&](long t) {
    backward_images(z, x, params, saved, d_slots, d_logits, s, d_x, d_start, scale, b * t / parts, b * (t + 1) / parts);
  });

  // Gradients of the weights (out, in) = grad^T @ rows, all iterations in one product, kStrip rows of it at a time
  const long total = z.all_rows();
  constexpr long kStrip = 48;
  const struct {
    Parameter to;
    const float* grad;
    long out;
    const float* rows;
    long in;
  } weights[] = {{kToQ, s.d_query, d, saved.scaled, d},
                 {kToK, saved.query, d, s.d_query_key, d},
                 {kToV, s.d_value, d, saved.mean, d},
                 {kGruInputWeight, s.d_input_gates, 3 * d, saved.value, d},
                 {kGruHiddenWeight, s.d_hidden_gates, 3 * d, saved.slots, d},
                 {kMlpInWeight, s.d_mlp_hidden, h, saved.mlp_in, d},
                 {kMlpOutWeight, s.d_out, d, saved.mlp_hidden, h}};
  for (const auto& w : weights) {
    parallel_for(threads, (w.out + kStrip - 1) / kStrip, [&](long strip) {
      const long from = strip * kStrip, rows = w.out - from < kStrip ? w.out - from : kStrip;
      matmul(rows, w.in, total, transpose_of(w.grad + from, w.out), w.rows, w.in, {d_params[w.to] + from * w.in, w.in});
    });
  }
  sum_rows(s.d_scaled, saved.normed, total, d, d_params[kNormSlotsWeight]);
  sum_rows(s.d_scaled, nullptr, total, d, d_params[kNormSlotsBias]);
  sum_rows(s.d_input_gates, nullptr, total, 3 * d, d_params[kGruInputBias]);
  sum_rows(s.d_hidden_gates, nullptr, total, 3 * d, d_params[kGruHiddenBias]);
  sum_rows(s.d_mlp_in, saved.mlp_normed, total, d, d_params[kNormMlpWeight]);
  sum_rows(s.d_mlp_in, nullptr, total, d, d_params[kNormMlpBias]);
  sum_rows(s.d_mlp_hidden, nullptr, total, h, d_params[kMlpInBias]);
  sum_rows(s.d_out, nullptr, total, d, d_params[kMlpOutBias]);
}

}  // extern "C"
