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

void unpack_matrix(const PackedMatrix& src, uint16_t* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) { kernels().unpack_strip(src, static_cast<int>(nb), out); });
}

}  // namespace kt_sft
