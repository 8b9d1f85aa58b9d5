#include "kernels/pack.h"

#include <cstring>

#include "common/bf16.h"
#include "common/thread_pool.h"

namespace kt_sft {
namespace {

// Element (n, k) of the source, zero in the padding.
template <class T>
T element(const T* codes, const PackedMatrix& w, int n, int k) {
  return n < w.rows && k < w.cols ? codes[int64_t{n} * w.cols + k] : T{0};
}

void pack_block(const PackedMatrix& w, const void* codes, int nb, int kb) {
  uint8_t* block = const_cast<uint8_t*>(w.block(nb, kb));
  for (int p = 0; p < kPairs; ++p) {
    for (int i = 0; i < kBlock; ++i) {
      const int n = nb * kBlock + i, k = kb * kBlock + 2 * p;
      uint8_t* pair = block + (p * kBlock + i) * pair_bytes(w.format);
      if (w.format == Format::bf16) {
        const auto* source = static_cast<const uint16_t*>(codes);
        const uint16_t values[2] = {element(source, w, n, k), element(source, w, n, k + 1)};
        std::memcpy(pair, values, sizeof values);
        continue;
      }
      const auto* source = static_cast<const int8_t*>(codes);
      const int8_t low = element(source, w, n, k), high = element(source, w, n, k + 1);
      if (w.format == Format::int8) {
        pair[0] = static_cast<uint8_t>(low), pair[1] = static_cast<uint8_t>(high);
      } else {
        pair[0] = static_cast<uint8_t>((low & 0xf) | (high << 4));
      }
    }
  }
}

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

void pack_matrix(const PackedMatrix& dst, const void* codes, const uint16_t* scales) {
  const int groups = dst.groups();
  parallel_for(dst.row_blocks(), [&](int64_t nb, int) {
    for (int kb = 0; kb < dst.col_blocks(); ++kb) pack_block(dst, codes, static_cast<int>(nb), kb);
    auto* out = const_cast<uint16_t*>(dst.scales) + nb * groups * kBlock;
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < kBlock; ++i) {
        const int64_t n = nb * kBlock + i;
        out[g * kBlock + i] = n < dst.rows ? scales[n * groups + g] : 0;
      }
  });
}

void unpack_matrix(const PackedMatrix& src, uint16_t* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) {
    for (int n = static_cast<int>(nb) * kBlock; n < (nb + 1) * kBlock && n < src.rows; ++n)
      for (int k = 0; k < src.cols; ++k) out[int64_t{n} * src.cols + k] = float_to_bf16(decode_element(src, n, k));
  });
}

}  // namespace kt_sft
