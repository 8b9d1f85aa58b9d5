// What a compiled variant offers to the layers above: no intrinsics, no templates.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/panel.h"

namespace kt_sft {

enum class Side { left, right };  // which operand the activations are; the weights are the other one

// One addend of a batch-reduce product: activations (m, q) times weights (c, q).
struct GemmTerm {
  const void* act;  // packed tiles [m tile][q tile], q_tiles = ceil(q / 32)
  int q;
  const PackedMatrix* packed;  // either packed weights: (c, q) = (n, k) if the activations are left, (k, n) if right
  const DenseView* dense;      // or a dense factor with element (c, q)
  int act_tiles = 0;           // tiles from one row of tiles of act to the next; 0: those of q
  bool few_rows = false;       // act was packed as few rows
};

// What the caller multiplies next: its first codes are asked for meanwhile. A hint only.
struct Upcoming {
  PackedMatrix packed;
  int c0;
  const void* act = nullptr;  // few rows of activations, packed as such, unless they are those of this product
  int64_t act_bytes = 0;
};

// out[m][c - c0] = sum over terms, fp32, overwritten; c0 a multiple of 32; m <= kMaxRows; nc <= kMaxCols, or
// kFewRowsCols where m, rounded up to tiles, times nc is no more than kMaxRows * kMaxCols.
struct GemmArgs {
  Side side;
  const GemmTerm* terms;
  int num_terms;
  int m, c0, nc;
  float* out;
  int64_t ldo;
  void* scratch;            // gemm_scratch_bytes, 64-byte aligned, one per thread
  bool transposed = false;  // out[c - c0][m] instead
  const Upcoming* upcoming = nullptr;
};

struct PackArgs {
  Side side;
  DenseView view;
  int c0, nc, q0, nq;
  void* dst;              // tile (c0, q0); the rest of the last tiles is filled with zeros
  int64_t q_stride;       // tiles from one row of tiles to the next
  bool few_rows = false;  // nc, all of the matrix's, at most kSkinnyRows: left tiles hold these alone; view.qs == 1
};

// Rows [row0, row0 + rows) of a row-major matrix (view.qs == 1), columns [0, nq) from the view's base on, to int8.
// With `fold`, an int8 matrix, column q is multiplied by the scale of that matrix's row q at column fold_column first.
struct QuantizeRowsArgs {
  DenseView view;
  int row0, rows, nq;
  int group;         // columns that share a scale: a multiple of 64, at most kMaxGroup8
  int8_t* tiles;     // left tile of (row 0, column 0)
  int64_t q_stride;  // tiles from one row of tiles to the next
  float* scales;     // [row][groups]
  int32_t* sums;     // [row][all_tiles]: sums of the codes of a row in a tile
  int64_t groups, all_tiles;
  const PackedMatrix* fold = nullptr;
  int fold_column = 0;
};

// One addend of an int8 product: activations that quantize_rows made, and int8 weights.
struct Gemm8Term {
  const int8_t* act;
  const float* scales;
  const int32_t* sums;
  int64_t q_tiles, groups;     // from one row (of tiles) of these to the next
  int q, group;                // group: columns that share a scale
  const PackedMatrix* packed;  // per channel or in groups of a multiple of 64
  DenseView rows{};            // activations yet to be quantised (qs == 1), instead of act, scales and sums
};

// Side::left:   out[m][c - c0] = sum over terms, sum_q act[m][q] W[c][q], with W's scales
// Side::right:  out[m][c - c0] = sum over terms, sum_q act[m][q] code[q][c]: W's scales are folded into act. A matrix
//               with several groups has another act for each of them, so it takes `rows`, quantised in the driver.
struct Gemm8Args {
  Side side;
  const Gemm8Term* terms;
  int num_terms;
  int m, c0, nc;
  float* out;
  int64_t ldo;
  void* scratch;  // gemm_scratch_bytes
};

// 32 rows of a weight matrix, row-major bf16 or fp32, to be quantised into block row nb of dst: bf16, int8 or int4.
struct QuantizeArgs {
  const void* weights;
  bool is_float;
  const PackedMatrix* dst;
  int nb;
};

// How gate and up become the hidden values: the equations are in elementwise.h.
enum class ActivationKind { silu, clamped_swiglu };
struct Activation {
  ActivationKind kind = ActivationKind::silu;
  float alpha = 1.0f, limit = 0.0f;  // of clamped_swiglu
};

struct KernelTable {
  const char* name;
  size_t tile_bytes;
  size_t gemm_scratch_bytes;
  bool wide_tasks;  // more columns than kMaxCols pay at more than kSkinnyRows rows, too
  void (*pack)(const PackArgs&);
  void (*gemm)(const GemmArgs&);
  // h = a(g) b(u) in fp32; g and u also as bf16 where g_saved is not null.
  void (*activate)(const Activation&, const float* g, const float* u, int n, float* h, uint16_t* g_saved,
                   uint16_t* u_saved);
  // dg, du of w * z; dw_parts[i / 32] = sum of z * h over 32 columns (a fixed order, whatever the split of the work);
  // h = bf16(a(g) b(u)) of the saved bf16 values where it is not null.
  void (*activate_backward)(const Activation&, const uint16_t* g, const uint16_t* u, const float* z, float w, int n,
                            float* dg, float* du, float* dw_parts, uint16_t* h);
  void (*to_bf16)(const float* from, int n, uint16_t* to);
  void (*add_scaled)(const float* from, float w, int n, float* to);  // to += w from
  bool (*quantize_strip)(const QuantizeArgs&);                       // false if a weight is NaN or Inf
  void (*unpack_strip)(const PackedMatrix&, int nb, float* out);     // rows [32 nb, 32 nb + 32) of (rows, cols)
  double (*peak)(int64_t iterations);  // multiply-adds on registers only; returns the operations done
  // Native int8 products; null where the ISA has no int8 dot product.
  void (*quantize_rows)(const QuantizeRowsArgs&);
  void (*gemm8)(const Gemm8Args&);
  double (*peak_int8)(int64_t iterations);
  uint64_t (*read)(const void* data, int64_t bytes, int64_t ahead);  // reads every byte once: probes.h
};

// The table that KT_SFT_ISA names, or the best that this CPU runs. Throws if the CPU cannot run it.
const KernelTable& kernels();
void select_isa(const char* name);  // null or "auto": the best
const char* const* runnable_isas(int* count);

}  // namespace kt_sft
