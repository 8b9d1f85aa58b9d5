#include "kernels/pack.h"

#include <atomic>

#include "common/thread_pool.h"
#include "kernels/kernel_table.h"

namespace kt_sft {

bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float) {
  std::atomic<bool> finite{true};
  parallel_for(dst.row_blocks(), [&](int64_t nb, int) {
    if (!kernels().quantize_strip({weights, is_float, &dst, static_cast<int>(nb)})) finite = false;
  });
  return finite;
}

void pack_int4_codes(const PackedMatrix& dst, const uint8_t* codes, const uint16_t* scales) {
  const int groups = dst.groups();
  parallel_for(dst.row_blocks(), [&](int64_t task, int) {
    const int nb = static_cast<int>(task);
    const auto row_of = [&](int i) { return int64_t{nb} * kBlock + i; };
    for (int kb = 0; kb < dst.col_blocks(); ++kb) {
      auto* block = const_cast<uint8_t*>(dst.block(nb, kb));
      for (int p = 0; p < kPairs; ++p)
        for (int i = 0; i < kBlock; ++i) {
          const bool inside = row_of(i) < dst.rows && kb * kBlock + 2 * p < dst.cols;
          // code + 8 to two's complement of four bits: the same bits but the highest
          block[p * kBlock + i] = inside ? codes[row_of(i) * (dst.cols / 2) + kb * kPairs + p] ^ 0x88 : 0;
        }
    }
    auto* to = const_cast<uint16_t*>(dst.scales) + int64_t{nb} * groups * kBlock;
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < kBlock; ++i) to[g * kBlock + i] = row_of(i) < dst.rows ? scales[row_of(i) * groups + g] : 0;
  });
}

void unpack_matrix(const PackedMatrix& src, uint16_t* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) { kernels().unpack_strip(src, static_cast<int>(nb), out); });
}

}  // namespace kt_sft
