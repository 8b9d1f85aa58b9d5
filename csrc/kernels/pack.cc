#include "kernels/pack.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "common/bf16.h"
#include "common/thread_pool.h"
#include "kernels/kernel_table.h"

namespace kt_sft {
namespace {

float decode_element(const PackedMatrix& w, int n, int k) {
  const int nb = n / kBlock, kb = k / kBlock;
  const uint8_t* pair = w.block(nb, kb) + ((k % kBlock / 2) * kBlock + n % kBlock) * pair_bytes(w.format);
  const bool high = k % 2;
  if (w.format == Format::bf16) {
    uint16_t bits;
    std::memcpy(&bits, pair + 2 * high, 2);
    return bf16_to_float(bits);
  }
  int code;
  if (w.format == Format::int8) {
    code = static_cast<int8_t>(pair[high]);
  } else {
    code = high ? static_cast<int8_t>(pair[0]) >> 4 : static_cast<int8_t>(pair[0] << 4) >> 4;
  }
  return static_cast<float>(code) * bf16_to_float(w.block_scales(nb, kb)[n % kBlock]);
}

}  // namespace

bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float) {
  std::atomic<bool> finite{true};
  parallel_for(dst.row_blocks(), [&](int64_t nb, int) {
    static thread_local std::vector<char> scratch;
    scratch.resize(quantize_scratch_bytes(int64_t{dst.col_blocks()} * kBlock));
    if (!kernels().quantize_strip({weights, is_float, &dst, static_cast<int>(nb), scratch.data()})) finite = false;
  });
  return finite;
}

void unpack_matrix(const PackedMatrix& src, uint16_t* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) {
    for (int n = static_cast<int>(nb) * kBlock; n < (nb + 1) * kBlock && n < src.rows; ++n)
      for (int k = 0; k < src.cols; ++k) out[int64_t{n} * src.cols + k] = float_to_bf16(decode_element(src, n, k));
  });
}

}  // namespace kt_sft
