// The loss of the MLP broadcast decoder (Seitzer et al. 2023) and its gradients, in single precision. A block of
// patches goes forward and backward before the next one begins, so only one block's activations are in memory.
// Shapes: b images, k slots, n patches, h hidden units, d channels of the features; h and d are multiples of kPanel.
//
// Layout: activations of a block are (rows, columns), one row for each pair of slot and patch, patches innermost.
// They are stored in panels of kPanel columns, (columns / kPanel, rows, kPanel), the packed format that a matrix
// product reads (Goto and van de Geijn 2008). A product writes its result in panels too, so nothing is packed in
// between.
//
// Zeros: about half of the activations behind a ReLU are zero, and the patches of a slot share most of them. A bit mask
// of each layer marks what is not zero; products skip what is zero in all rows that they read together.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "registers.h"

namespace {

constexpr int kTileRows = 6;                     // rows of a tile of a product
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;  // registers of each row: 24 or 12 sums
constexpr int kPanel = kTileVecs * kLanes;       // columns of a panel
constexpr int kGroup = 96;                       // patches of a slot that share zeros in a weight's gradient, at most

using Row = Vec[kTileVecs];  // one row of a panel
using Word = uint64_t;       // one bit for each of 64 columns: whether the element differs from zero, as NaN does

SLOTNB_INLINE void load_row(const float* p, Row& row) {
  for (int v = 0; v < kTileVecs; ++v)
    row[v] = load(p + v * kLanes);
}

SLOTNB_INLINE void store_row(float* p, const Row& row) {
  for (int v = 0; v < kTileVecs; ++v)
    store(p + v * kLanes, row[v]);
}

SLOTNB_INLINE unsigned nonzero_lanes(Vec x) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#endif
}

// Marks in mask (columns / 64, rows) what is not zero of a row in the panel that begins at `column`.
SLOTNB_INLINE void mark_nonzero(const Row& x, Word* mask, long rows, long row, long column) {
  Word bits = 0;
  for (int v = 0; v < kTileVecs; ++v)
    bits |= (Word)nonzero_lanes(x[v]) << v * kLanes;
  memcpy((char*)(mask + column / 64 * rows + row) + column % 64 / 8, &bits, kPanel / 8);
}

// f(first row, height) for tiles of at most kTileRows rows, of one height or nearly; the height is a constant.
template <class F>
SLOTNB_INLINE void for_each_tile(long rows, F f) {
  const long tiles = (rows + kTileRows - 1) / kTileRows;
  for (long tile = 0, i = 0; tile < tiles; ++tile) {
    const long height = rows / tiles + (tile < rows % tiles);
    switch (height) {
      case 1:
        f(i, std::integral_constant<int, 1>());
        break;
      case 2:
        f(i, std::integral_constant<int, 2>());
        break;
      case 3:
        f(i, std::integral_constant<int, 3>());
        break;
      case 4:
        f(i, std::integral_constant<int, 4>());
        break;
      case 5:
        f(i, std::integral_constant<int, 5>());
        break;
      case 6:
        f(i, std::integral_constant<int, 6>());
        break;
    }
    i += height;
  }
}

// sums[r] += a[r * stride] * b for the rows of a tile; b is one row of a panel.
template <int rows>
SLOTNB_INLINE void add_outer(Row (&sums)[rows], const float* a, long stride, const float* b) {
  Row right;
  load_row(b, right);
  for (int r = 0; r < rows; ++r) {
    const Vec x = broadcast(a[r * stride]);
    for (int v = 0; v < kTileVecs; ++v)
      sums[r][v] += x * right[v];
  }
}

// x (rows, inner), in panels, times a matrix (inner, cols): pack(j, to) writes the latter's columns [j, j + kPanel) to
// `to` (inner, kPanel), and finish(row, column, offset, sums) gets each row of each panel of the product; `offset` is
// where it lies in panels. mask: what is not zero in x, or null. packed: (threads, inner, kPanel).
template <class Pack, class Finish>
void panel_matmul(long threads, const float* x, const Word* mask, long rows, long cols, long inner, float* packed,
                  const float* bias, Pack pack, Finish finish) {
  const long panels = cols / kPanel;
  const long parts = (threads + panels - 1) / panels;  // of the rows, where there are more threads than panels
  parallel_for(threads, threads, [&](long thread) {
    float* b = packed + thread * inner * kPanel;
    for (long task = thread; task < panels * parts; task += threads) {
      const long j = task / parts * kPanel;
      const long from = task % parts * rows / parts, to = (task % parts + 1) * rows / parts;
      pack(j, b);
      for_each_tile(to - from, [&](long i, auto height) {
        constexpr int tile_rows = height;
        Row sums[tile_rows];
        i += from;
        for (int r = 0; r < tile_rows; ++r) {
          for (int v = 0; v < kTileVecs; ++v)
            sums[r][v] = bias ? load(bias + j + v * kLanes) : Vec{};
        }
        if (mask) {
          for (long p = 0; p < inner; p += 64) {
            Word bits = 0;
            for (int r = 0; r < tile_rows; ++r)
              bits |= mask[p / 64 * rows + i + r];
            const float* a = x + p * rows + i * kPanel;
            const float* ahead = a + tile_rows * kPanel;  // what the next tile reads
            for (; bits; bits &= bits - 1) {
              const long q = __builtin_ctzll(bits), panel = q / kPanel * kPanel * rows;
              __builtin_prefetch(ahead + panel + q % kPanel * tile_rows);
              add_outer<tile_rows>(sums, a + panel + q % kPanel, kPanel, b + (p + q) * kPanel);
            }
          }
        } else {
          for (long p = 0; p < inner; p += kPanel) {
            const float* a = x + p * rows + i * kPanel;
            const float* ahead = a + tile_rows * kPanel;
            for (long q = 0; q < kPanel; ++q, ahead += tile_rows) {
              __builtin_prefetch(ahead);
              add_outer<tile_rows>(sums, a + q, kPanel, b + (p + q) * kPanel);
            }
          }
        }
        for (int r = 0; r < tile_rows; ++r)
          finish(i + r, j, j * rows + (i + r) * kPanel, sums[r]);
      });
    }
  });
}

// Packs weight^T, for weight (cols, inner).
auto pack_transposed(const float* weight, long inner) {
  return [=](long j, float* to) {
    transpose(weight + j * inner, kPanel, inner, to, kPanel);
  };
}

// Packs weight (inner, cols).
auto pack_columns(const float* weight, long inner, long cols) {
  return [=](long j, float* to) {
    for (long r = 0; r < inner; ++r) {
      for (long c = 0; c < kPanel; c += 16)
        __builtin_prefetch(weight + (r + 32) * cols + j + c, 0, 2);
      Row row;
      load_row(weight + r * cols + j, row);
      store_row(to + r * kPanel, row);
    }
  };
}

// Floats of scratch memory for `columns` columns of `add_weight_gradient`: a group of patches and the columns' numbers.
long strip_size(long columns) {
  return (kGroup + 1l) * columns;
}

// total (cols, x_cols) += grad^T @ x for grad (slots * m, cols) and x (slots * m, x_cols), both in panels; slots are
// those of all images. mask: what is not zero in grad, or null. Columns that are zero in a group of patches of a slot
// are skipped for that group; the others are packed in strips of a tile's height.
void add_weight_gradient(long threads, const float* grad, const Word* mask, const float* x, long slots, long m,
                         long cols, long x_cols, float* total, float* scratch) {
  const long rows = slots * m;
  const long groups = (m + kGroup - 1) / kGroup;  // of a slot's patches
  parallel_for(threads, threads, [&](long thread) {
    const long from = cols * thread / threads, to = cols * (thread + 1) / threads;
    float* strip = scratch + thread * strip_size(cols / threads + 1);
    int* kept = (int*)(strip + kGroup * (cols / threads + 1));  // columns that are not skipped
    for (long group = 0; group < slots * groups; ++group) {
      const long slot = group / groups, part = group % groups;
      const long start = slot * m + part * m / groups;
      const long depth = slot * m + (part + 1) * m / groups - start;
      long count = 0;
      for (long column = from / 64 * 64; column < to; column += 64) {
        Word bits = mask ? 0 : ~Word(0);
        for (long r = 0; mask && r < depth; ++r)
          bits |= mask[column / 64 * rows + start + r];
        for (; bits; bits &= bits - 1) {
          const long c = column + __builtin_ctzll(bits);
          if (c >= from && c < to)
            kept[count++] = c;
        }
      }
      for_each_tile(count, [&](long i, auto height) {
        constexpr int tile_rows = height;
        const float* columns[tile_rows];
        for (int r = 0; r < tile_rows; ++r) {
          columns[r] = grad + kept[i + r] / kPanel * rows * kPanel + start * kPanel + kept[i + r] % kPanel;
        }
        float* packed = strip + i * kGroup;
        for (long q = 0; q < depth; ++q) {
          for (int r = 0; r < tile_rows; ++r)
            *packed++ = columns[r][q * kPanel];
        }
      });
      for (long j = 0; j < x_cols; j += kPanel) {
        const float* b = x + j * rows + start * kPanel;
        for_each_tile(count, [&](long i, auto height) {
          constexpr int tile_rows = height;
          Row sums[tile_rows] = {};
          const float* a = strip + i * kGroup;
          for (int r = 0; r < tile_rows && i + tile_rows + r < count; ++r) {
            const float* next = total + (long)kept[i + tile_rows + r] * x_cols + j;
            for (int c = 0; c < kPanel; c += 16)
              __builtin_prefetch(next + c, 1);
          }
          for (long q = 0; q < depth; ++q)
            add_outer<tile_rows>(sums, a + q * tile_rows, 1, b + q * kPanel);
          for (int r = 0; r < tile_rows; ++r) {
            float* sum_to = total + (long)kept[i + r] * x_cols + j;
            for (int v = 0; v < kTileVecs; ++v) {
              store(sum_to + v * kLanes, load(sum_to + v * kLanes) + sums[r][v]);
            }
          }
        });
      }
    }
  });
}

// total (cols) += the sum over rows of x (rows, cols), in panels.
void add_bias_gradient(long threads, const float* x, long rows, long cols, float* total) {
  parallel_for(threads, cols / kPanel, [&](long panel) {
    Row sums;
    const float* row = x + panel * kPanel * rows;
    load_row(total + panel * kPanel, sums);
    for (long r = 0; r < rows; ++r, row += kPanel) {
      for (int v = 0; v < kTileVecs; ++v)
        sums[v] += load(row + v * kLanes);
    }
    store_row(total + panel * kPanel, sums);
  });
}

struct Sizes {
  long layers;  // hidden layers behind the first
  long b, k, n, h, d;
  long block_images, block_patches;  // of a block, at most
  long threads;
};

struct Inputs {
  const float* slot_part;      // (b, k, h) the first layer's output for the slots, bias included
  const float* pos_part;       // (n, h) and for the positions
  const float* alpha;          // (h) weight of the mask logits, and their bias
  const float* target;         // (b, n, d)
  const float* const* layers;  // weight (out, in) and bias (out) of each hidden layer, then of the last layer (d, h)
  float alpha_bias, temperature;
  float scale;  // gradients are those of scale / 2 times the sum of squares
};

struct Gradients {
  float* slot_part;
  float* pos_part;
  float* alpha;
  float* alpha_bias;
  float* const* layers;
};

// Memory of one block: rows are pairs of slot and patch, pairs are those of image and patch; all but the masks in
// panels.
struct Scratch {
  std::vector<float*> acts;  // (rows, h), then the gradient of the same
  std::vector<float*> mask_words;
  float *mix, *d_mix;                                                // (pairs, h)
  float* d_recon;                                                    // (pairs, d)
  float *masks, *d_masks;                                            // (images, k, patches)
  float* dots;                                                       // (h / kPanel, rows) or (rows, kLanes)
  float* packed;                                                     // of the products
  Word* mask(long layer) const { return (Word*)mask_words[layer]; }  // (h / 64, rows) what is not zero in acts
  long divide_up(float* base, const Sizes& z) {
    const long pairs = z.block_images * z.block_patches, rows = z.k * pairs;
    const long padded = round_up(z.block_patches, kLanes), widest = z.h > z.d ? z.h : z.d;
    const long matmul = z.threads * kPanel * widest, gradient = z.threads * strip_size(widest / z.threads + 1);
    acts.resize(z.layers + 1);
    mask_words.resize(z.layers + 1);
    long used = 0;
    for (long l = 0; l <= z.layers; ++l) {
      used += divide(base + used, {{&acts[l], rows * z.h}, {&mask_words[l], (z.h + 63) / 64 * rows * 2}});
    }
    return used + divide(base + used, {{&mix, pairs * z.h},
                                       {&d_mix, pairs * z.h},
                                       {&d_recon, pairs * z.d},
                                       {&masks, z.block_images * z.k * padded},
                                       {&d_masks, z.block_images * z.k * padded},
                                       {&dots, rows * (z.h / kPanel > kLanes ? z.h / kPanel : kLanes)},
                                       {&packed, matmul > gradient ? matmul : gradient}});
  }
};

// Patches [from, from + m) of z.b images, forward and backward; adds to the gradients.
// Returns the sum of the squared errors.
double block_mse(const Sizes& z, const Inputs& in, const Gradients& grads, const Scratch& s, long from, long m) {
  const long h = z.h, d = z.d, k = z.k, slots = z.b * k, pairs = z.b * m, rows = slots * m, threads = z.threads;
  const long padded = round_up(m, kLanes), top = z.layers;
  const float *last_weight = in.layers[2 * top], *last_bias = in.layers[2 * top + 1];
  if (h % 64) {  // the last word of a row is not full
    for (long l = 0; l <= top; ++l)
      memset(s.mask(l) + h / 64 * rows, 0, rows * sizeof(Word));
  }
  // Stores one panel of a row's activations, marks its zeros, and adds up the mask logits from the top layer.
  const auto keep = [&](long layer, long row, long j, const Row& y) {
    store_row(s.acts[layer] + j * rows + row * kPanel, y);
    mark_nonzero(y, s.mask(layer), rows, row, j);
    if (layer == top) {
      Vec dot{};
      for (int v = 0; v < kTileVecs; ++v)
        dot += y[v] * load(in.alpha + j + v * kLanes);
      s.dots[j / kPanel * rows + row] = sum(dot);
    }
  };

  // First layer: slot + position
  parallel_for(threads, slots, [&](long slot) {
    for (long j = 0; j < h; j += kPanel) {
      for (long p = 0; p < m; ++p) {
        const float *a = in.slot_part + slot * h + j, *b = in.pos_part + (from + p) * h + j;
        Row y;
        for (int v = 0; v < kTileVecs; ++v)
          y[v] = relu(load(a + v * kLanes) + load(b + v * kLanes));
        keep(0, slot * m + p, j, y);
      }
    }
  });

  // Hidden layers
  for (long l = 0; l < top; ++l) {
    panel_matmul(threads, s.acts[l], s.mask(l), rows, h, h, s.packed, in.layers[2 * l + 1],
                 pack_transposed(in.layers[2 * l], h), [&](long row, long j, long, const Row& sums) {
                   Row y;
                   for (int v = 0; v < kTileVecs; ++v)
                     y[v] = relu(sums[v]);
                   keep(l + 1, row, j, y);
                 });
  }

  // Masks (images, k, patches)
  parallel_for(threads, slots, [&](long slot) {
    float* logits = s.masks + slot * padded;
    memset(logits, 0, padded * sizeof(float));
    for (long p = 0; p < m; ++p) {
      logits[p] = in.alpha_bias;
      for (long panel = 0; panel < h / kPanel; ++panel)
        logits[p] += s.dots[panel * rows + slot * m + p];
    }
  });
  parallel_for(threads, z.b,
               [&](long i) { softmax_over_slots(s.masks + i * k * padded, k, padded, padded, 1 / in.temperature); });

  // Mixture over slots, then the last layer, which is linear: mixing first makes it k times cheaper
  parallel_for(threads, h / kPanel, [&](long panel) {
    for (long i = 0; i < z.b; ++i) {
      for (long p = 0; p < m; ++p) {
        Row mix = {};
        for (long slot = i * k; slot < i * k + k; ++slot) {
          const float mask = s.masks[slot * padded + p];
          const float* y = s.acts[top] + (panel * rows + slot * m + p) * kPanel;
          for (int v = 0; v < kTileVecs; ++v)
            mix[v] += mask * load(y + v * kLanes);
        }
        store_row(s.mix + (panel * pairs + i * m + p) * kPanel, mix);
      }
    }
  });
  panel_matmul(threads, s.mix, nullptr, pairs, d, h, s.packed, last_bias, pack_transposed(last_weight, h),
               [&](long row, long j, long offset, const Row& recon) {
                 const float* want = in.target + (row / m * z.n + from + row % m) * d + j;
                 for (int v = 0; v < kTileVecs; ++v) {
                   store(s.d_recon + offset + v * kLanes, recon[v] - load(want + v * kLanes));
                 }
               });
  double squares = 0;
  for (long i = 0; i < pairs; ++i) {
    Vec pair_squares{};
    for (long j = 0; j < d; j += kLanes) {
      float* error = s.d_recon + i * d + j;
      const Vec x = load(error);
      pair_squares += x * x;
      store(error, x * in.scale);
    }
    squares += sum(pair_squares);
  }

  // Backward: the last layer and the mixture
  add_bias_gradient(threads, s.d_recon, pairs, d, grads.layers[2 * top + 1]);
  add_weight_gradient(threads, s.d_recon, nullptr, s.mix, z.b, m, d, h, grads.layers[2 * top], s.packed);
  panel_matmul(threads, s.d_recon, nullptr, pairs, h, d, s.packed, nullptr, pack_columns(last_weight, d, h),
               [&](long, long, long offset, const Row& y) { store_row(s.d_mix + offset, y); });
  parallel_for(threads, slots, [&](long slot) {
    float* dots = s.dots + slot * m * kLanes;
    float* d_masks = s.d_masks + slot * padded;
    memset(dots, 0, m * kLanes * sizeof(float));
    memset(d_masks, 0, padded * sizeof(float));
    for (long j = 0; j < h; j += kPanel) {
      for (long p = 0; p < m; ++p) {
        const float* y = s.acts[top] + j * rows + (slot * m + p) * kPanel;
        const float* grad = s.d_mix + j * pairs + (slot / k * m + p) * kPanel;
        Vec dot = load(dots + p * kLanes);
        for (long c = 0; c < kPanel; c += kLanes)
          dot += load(y + c) * load(grad + c);
        store(dots + p * kLanes, dot);
      }
    }
    for (long p = 0; p < m; ++p)
      d_masks[p] = sum(load(dots + p * kLanes));
  });
  parallel_for(threads, z.b, [&](long i) {
    softmax_over_slots_backward(s.masks + i * k * padded, s.d_masks + i * k * padded, k, padded, padded,
                                1 / in.temperature);
  });
  for (long slot = 0; slot < slots; ++slot) {
    for (long p = 0; p < m; ++p)
      *grads.alpha_bias += s.d_masks[slot * padded + p];
  }

  // The gradient of the top layer takes the place of its activations
  parallel_for(threads, h / kPanel, [&](long panel) {
    const long j = panel * kPanel;
    Row alpha, d_alpha;
    load_row(in.alpha + j, alpha);
    load_row(grads.alpha + j, d_alpha);
    for (long slot = 0; slot < slots; ++slot) {
      for (long p = 0; p < m; ++p) {
        const float mask = s.masks[slot * padded + p], d_mask = s.d_masks[slot * padded + p];
        float* y = s.acts[top] + j * rows + (slot * m + p) * kPanel;
        const float* grad = s.d_mix + j * pairs + (slot / k * m + p) * kPanel;
        for (int v = 0; v < kTileVecs; ++v) {
          const Vec act = load(y + v * kLanes);
          d_alpha[v] += d_mask * act;
          store(y + v * kLanes, relu_backward(act, mask * load(grad + v * kLanes) + d_mask * alpha[v]));
        }
      }
    }
    store_row(grads.alpha + j, d_alpha);
  });

  // Hidden layers; again each gradient takes the place of the activations
  for (long l = top - 1; l >= 0; --l) {
    float *below = s.acts[l], *grad = s.acts[l + 1];
    const float* weight = in.layers[2 * l];
    add_bias_gradient(threads, grad, rows, h, grads.layers[2 * l + 1]);
    add_weight_gradient(threads, grad, s.mask(l + 1), below, slots, m, h, h, grads.layers[2 * l], s.packed);
    panel_matmul(threads, grad, s.mask(l + 1), rows, h, h, s.packed, nullptr, pack_columns(weight, h, h),
                 [=](long, long, long offset, const Row& sums) {
                   for (int v = 0; v < kTileVecs; ++v) {
                     float* to = below + offset + v * kLanes;
                     store(to, relu_backward(load(to), sums[v]));
                   }
                 });
  }

  // First layer: sums over patches for slots, over slots for positions
  parallel_for(threads, h / kPanel, [&](long panel) {
    const long j = panel * kPanel;
    const float* grad = s.acts[0] + j * rows;
    for (long slot = 0; slot < slots; ++slot) {
      Row sums;
      load_row(grads.slot_part + slot * h + j, sums);
      for (long p = 0; p < m; ++p, grad += kPanel) {
        float* d_pos = grads.pos_part + (from + p) * h + j;
        for (int v = 0; v < kTileVecs; ++v) {
          const Vec x = load(grad + v * kLanes);
          sums[v] += x;
          store(d_pos + v * kLanes, load(d_pos + v * kLanes) + x);
        }
      }
      store_row(grads.slot_part + slot * h + j, sums);
    }
  });
  return squares;
}

}  // namespace

extern "C" {

// Columns of a panel: hidden units and channels are multiples of it.
long mlp_decoder_panel() {
  return kPanel;
}

// Floats of scratch memory that `mlp_decoder_mse` needs.
long mlp_decoder_scratch(long layers, long b, long k, long n, long h, long d, long block_images, long block_patches,
                         long threads) {
  Scratch s;
  return s.divide_up(nullptr, {layers, b, k, n, h, d, block_images, block_patches, threads});
}

// Returns the sum of squared errors, and adds its gradients, times scale / 2, to those given, which begin as zeros.
// Shapes are those of `Inputs`; layers and d_layers are 2 * (layers + 1) pointers.
double mlp_decoder_mse(const float* slot_part, const float* pos_part, const float* alpha, const float* alpha_bias,
                       const float* target, const float* const* layer_params, float* d_slot_part, float* d_pos_part,
                       float* d_alpha, float* d_alpha_bias, float* const* d_layer_params, float* scratch, long layers,
                       long b, long k, long n, long h, long d, long block_images, long block_patches, long threads,
                       float temperature, float scale) {
  Sizes z{layers, b, k, n, h, d, block_images, block_patches, threads};
  Scratch s;
  s.divide_up(scratch, z);
  double squares = 0;
  for (long i = 0; i < b; i += block_images) {
    z.b = b - i < block_images ? b - i : block_images;
    const Inputs in{slot_part + i * k * h, pos_part,    alpha,       target + i * n * d,
                    layer_params,          *alpha_bias, temperature, scale};
    const Gradients grads{d_slot_part + i * k * h, d_pos_part, d_alpha, d_alpha_bias, d_layer_params};
    for (long from = 0; from < n; from += block_patches) {
      squares += block_mse(z, in, grads, s, from, n - from < block_patches ? n - from : block_patches);
    }
  }
  return squares;
}

// One hidden layer by itself, for tests: x (rows, inner) in panels -> relu(x @ weight^T + bias) (rows, cols) in panels.
// mask (inner / 64, rows) begins as zeros; where it is null no zeros are skipped. packed: (threads, inner, kPanel).
void mlp_decoder_layer(const float* x, uint64_t* mask, const float* weight, const float* bias, float* out,
                       float* packed, long rows, long cols, long inner, long threads) {
  for (long j = 0; mask && j < inner; j += kPanel) {
    for (long r = 0; r < rows; ++r) {
      Row row;
      load_row(x + j * rows + r * kPanel, row);
      mark_nonzero(row, mask, rows, r, j);
    }
  }
  panel_matmul(threads, x, mask, rows, cols, inner, packed, bias, pack_transposed(weight, inner),
               [=](long, long, long offset, const Row& sums) {
                 for (int v = 0; v < kTileVecs; ++v)
                   store(out + offset + v * kLanes, relu(sums[v]));
               });
}

}  // extern "C"
