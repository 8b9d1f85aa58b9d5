// Activations quantised for native int8 products: codes as left tiles, scales per row and group, sums per row and tile.
#pragma once
#include "common/workspace.h"
#include "kernels/kernel_table.h"

namespace kt_sft {

struct Int8Rows {
  int8_t* tiles = nullptr;  // [row tile][q tile]
  float* scales = nullptr;  // [row][groups]
  int32_t* sums = nullptr;  // [row][q tiles]
  int width = 0, group = 0;
  int64_t q_tiles = 0, groups = 0;

  void take(Workspace& workspace, int64_t row_tiles, int columns, int columns_per_scale) {
    width = columns, group = columns_per_scale;
    q_tiles = ceil_div(width, kSteps8), groups = ceil_div(width, group);
    tiles = workspace.take<int8_t>(row_tiles * q_tiles * kTile8Bytes);
    scales = workspace.take<float>(row_tiles * kTileRows * groups);
    sums = workspace.take<int32_t>(row_tiles * kTileRows * q_tiles);
  }

  // Rows [row0, row0 + rows) of `view` become columns [c0, c0 + nc) of the rows from `row_tile` on; c0 starts a group.
  // With `fold` they are multiplied by the scales of its rows first, the first of which belongs to column c0.
  void quantize(const KernelTable& kernels, int64_t row_tile, int c0, const DenseView& view, int row0, int rows, int nc,
                const PackedMatrix* fold = nullptr) const {
    const int64_t row = row_tile * kTileRows;
    kernels.quantize_rows({view, row0, rows, nc, group, tiles + (row_tile * q_tiles + c0 / kSteps8) * kTile8Bytes,
                           q_tiles, scales + row * groups + c0 / group, sums + row * q_tiles + c0 / kSteps8, groups,
                           q_tiles, fold});
  }

  // Columns from q0 on, which starts a group, of the rows from `row_tile` on, times weights.
  Gemm8Term term(int64_t row_tile, const PackedMatrix& weights, int q0, int q) const {
    const int64_t row = row_tile * kTileRows;
    return {tiles + (row_tile * q_tiles + q0 / kSteps8) * kTile8Bytes,
            scales + row * groups + q0 / group,
            sums + row * q_tiles + q0 / kSteps8,
            q_tiles,
            groups,
            q,
            group,
            &weights};
  }
};

// Whether each row has one scale, which can be folded into a gradient once for all columns.
inline bool per_channel(const PackedMatrix& weights) { return weights.plane_groups(0) == 1; }

}  // namespace kt_sft
