#include "moe/product.h"

#include <algorithm>

#include "common/thread_pool.h"
#include "common/workspace.h"
#include "moe/int8_rows.h"

namespace kt_sft {

void packed_product(const PackedMatrix& weights, Side side, const uint16_t* act, int64_t m, float* out) {
  const KernelTable& kernels = kt_sft::kernels();
  const int q = side == Side::left ? weights.cols : weights.rows, c = side == Side::left ? weights.rows : weights.cols;
  const int64_t q_tiles = ceil_div(q, kTileSteps), tile_row_bytes = q_tiles * static_cast<int64_t>(kernels.tile_bytes);
  const int64_t row_steps = ceil_div(m, kMaxRows), column_steps = ceil_div(c, kMaxCols);
  Workspace workspace;
  char *tiles_at = nullptr, *scratch = nullptr;
  const auto take = [&] {
    tiles_at = workspace.take<char>(ceil_div(m, kTileRows) * tile_row_bytes);
    scratch = workspace.take<char>(round_up(kernels.gemm_scratch_bytes, 64) * num_threads());
  };
  take();
  workspace.reserve();
  take();
  parallel_for(ceil_div(m, kTileRows), [&](int64_t tile, int) {
    const int row = static_cast<int>(tile) * kTileRows;
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, m - row));
    kernels.pack({side, {act, false, q, 1}, row, rows, 0, q, tiles_at + tile * tile_row_bytes, q_tiles});
  });
  parallel_for(row_steps * column_steps, [&](int64_t task, int thread) {
    const int64_t row = task / column_steps * kMaxRows;
    const int c0 = static_cast<int>(task % column_steps) * kMaxCols;
    const GemmTerm term{tiles_at + row / kTileRows * tile_row_bytes, q, &weights, nullptr};
    kernels.gemm({side, &term, 1, static_cast<int>(std::min<int64_t>(kMaxRows, m - row)), c0,
                  std::min(kMaxCols, c - c0), out + row * c + c0, c,
                  scratch + round_up(kernels.gemm_scratch_bytes, 64) * thread});
  });
}

void packed_product8(const PackedMatrix& weights, Side side, const uint16_t* act, int64_t m, int group, float* out) {
  const KernelTable& kernels = kt_sft::kernels();
  const int q = side == Side::left ? weights.cols : weights.rows, c = side == Side::left ? weights.rows : weights.cols;
  const int64_t row_steps = ceil_div(m, kMaxRows), column_steps = ceil_div(c, kMaxCols);
  const bool ahead = side == Side::left || per_channel(weights);  // quantised before, or in the driver
  Workspace workspace;
  Int8Rows rows;
  char* scratch = nullptr;
  const auto take = [&] {
    rows.take(workspace, ceil_div(m, kTileRows), q, group);
    scratch = workspace.take<char>(round_up(kernels.gemm_scratch_bytes, 64) * num_threads());
  };
  take();
  workspace.reserve();
  take();
  parallel_for(ahead ? ceil_div(m, kTileRows) : 0, [&](int64_t tile, int) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, m - tile * kTileRows));
    rows.quantize(kernels, tile, 0, {act, false, q, 1}, static_cast<int>(tile) * kTileRows, count, q,
                  side == Side::right ? &weights : nullptr);
  });
  parallel_for(row_steps * column_steps, [&](int64_t task, int thread) {
    const int64_t row = task / column_steps * kMaxRows;
    const int c0 = static_cast<int>(task % column_steps) * kMaxCols;
    Gemm8Term term = rows.term(row / kTileRows, weights, 0, q);
    if (!ahead) term.rows = {act + row * q, false, q, 1};
    kernels.gemm8({side, &term, 1, static_cast<int>(std::min<int64_t>(kMaxRows, m - row)), c0,
                   std::min(kMaxCols, c - c0), out + row * c + c0, c,
                   scratch + round_up(kernels.gemm_scratch_bytes, 64) * thread});
  });
}

}  // namespace kt_sft
