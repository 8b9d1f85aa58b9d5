#include "kernels/pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/bf16.h"
#include "common/thread_pool.h"
#include "kernels/kernel_table.h"

namespace kt_sft {
namespace {

uint32_t pair_of(float even, float odd) { return float_to_bf16(even) | uint32_t{float_to_bf16(odd)} << 16; }

// A block -> pairs of bf16 [p][n], written from panel.h alone: no decoder of the kernels is used, which makes unpacking
// a check on them.
void unpack_block(const PackedMatrix& w, int nb, int kb, uint32_t* pairs) {
  const uint8_t* block = w.block(nb, kb);
  if (w.format == Format::bf16) {
    std::memcpy(pairs, block, kPairs * kBlock * sizeof *pairs);
    return;
  }
  float scale[kBlock];
  for (int n = 0; n < kBlock; ++n) scale[n] = bf16_to_float(w.block_scales(nb, kb)[n]);
  for (int p = 0; p < kPairs; ++p, pairs += kBlock, block += kBlock * pair_bytes(w.format)) {
    if (w.format == Format::int8) {
      const auto* codes = reinterpret_cast<const int8_t*>(block);
      for (int n = 0; n < kBlock; ++n) pairs[n] = pair_of(codes[2 * n] * scale[n], codes[2 * n + 1] * scale[n]);
    } else {
      for (int n = 0; n < kBlock; ++n) {
        const int both = static_cast<int8_t>(block[n]);
        const int low = static_cast<int8_t>(block[n] << 4) >> 4;
        pairs[n] = pair_of(low * scale[n], (both >> 4) * scale[n]);
      }
    }
  }
}

}  // namespace

bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float) {
  std::atomic<bool> finite{true};
  parallel_for(dst.row_blocks(), [&](int64_t nb, int) {
    if (!kernels().quantize_strip({weights, is_float, &dst, static_cast<int>(nb)})) finite = false;
  });
  return finite;
}

void unpack_matrix(const PackedMatrix& src, uint16_t* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) {
    const int n0 = static_cast<int>(nb) * kBlock, rows = std::min(kBlock, src.rows - n0);
    for (int kb = 0; kb < src.col_blocks(); ++kb) {
      uint32_t pairs[kPairs * kBlock], row[kPairs];
      unpack_block(src, static_cast<int>(nb), kb, pairs);
      const int cols = std::min(kBlock, src.cols - kb * kBlock);
      for (int n = 0; n < rows; ++n) {
        for (int p = 0; p < kPairs; ++p) row[p] = pairs[p * kBlock + n];
        std::memcpy(out + int64_t{n0 + n} * src.cols + kb * kBlock, row, cols * sizeof *out);
      }
    }
  });
}

}  // namespace kt_sft
