#include "kernels/pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

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

namespace {

// What is stored differs from the code + 8 that comes in: four bits of two's complement differ in the highest.
constexpr uint8_t flipped_bits(Format format) { return format == Format::int4 || format == Format::q4_0 ? 0x88 : 0; }

// Pair p of row i into its place in a block: the two codes as one byte of nibbles, or as two bytes.
void store_pair(int bits, const uint8_t* pair, int p, int i, uint8_t flip, uint8_t* block) {
  if (bits == 4) {
    block[p * kBlock + i] = pair[0] ^ flip;
  } else if (bits == 8) {
    block[(p * kBlock + i) * 2] = pair[0], block[(p * kBlock + i) * 2 + 1] = pair[1];
  } else {
    const int high = bits - 4, pairs_per_byte = 4 / high;  // see panel.h
    block[p * kBlock + i] = static_cast<uint8_t>((pair[0] & 15) | pair[1] << 4);
    const int more = pair[0] >> 4 | (pair[1] >> 4) << high;
    block[(kPairs + p / pairs_per_byte) * kBlock + i] |= static_cast<uint8_t>(more << (p % pairs_per_byte * 2 * high));
  }
}

void pack_block(const PackedMatrix& dst, int nb, int kb, const uint8_t* codes) {
  auto* block = const_cast<uint8_t*>(dst.block(nb, kb));
  std::memset(block, 0, dst.block_bytes());
  const int bits = info(dst.format).bits, pair_bytes = bits == 4 ? 1 : 2;
  const int64_t row_bytes = ceil_div(dst.cols, 2) * pair_bytes;
  const uint8_t flip = flipped_bits(dst.format);
  const int rows = std::min(kBlock, dst.rows - nb * kBlock), columns = std::min(kBlock, dst.cols - kb * kBlock);
  for (int i = 0; i < rows; ++i) {
    const uint8_t* row = codes + (int64_t{nb} * kBlock + i) * row_bytes + int64_t{kb} * kPairs * pair_bytes;
    for (int p = 0; 2 * p < columns; ++p) store_pair(bits, row + p * pair_bytes, p, i, flip, block);
  }
}

// (rows, groups) elements -> [group][lane]; the lanes of rows that the matrix lacks are zeros.
void pack_plane(const PackedMatrix& dst, int nb, int p, const uint8_t* from) {
  const Plane plane = dst.plane(p);
  const int groups = dst.plane_groups(p), rows = plane.lanes == 1 ? dst.row_blocks() : dst.rows;
  auto* to = const_cast<uint8_t*>(dst.scale_plane(p, nb));
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < plane.lanes; ++i, to += plane.bytes) {
      const int64_t row = int64_t{nb} * plane.lanes + i;
      if (row < rows) {
        std::memcpy(to, from + (row * groups + g) * plane.bytes, plane.bytes);
      } else {
        std::memset(to, 0, plane.bytes);
      }
    }
}

}  // namespace

void pack_codes(const PackedMatrix& dst, const uint8_t* codes, const uint8_t* const* planes) {
  parallel_for(dst.row_blocks(), [&](int64_t task, int) {
    const int nb = static_cast<int>(task);
    for (int kb = 0; kb < dst.col_blocks(); ++kb) pack_block(dst, nb, kb, codes);
    for (int p = 0; p < kMaxPlanes && dst.plane(p).lanes > 0; ++p) pack_plane(dst, nb, p, planes[p]);
  });
}

void unpack_matrix(const PackedMatrix& src, float* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) { kernels().unpack_strip(src, static_cast<int>(nb), out); });
}

}  // namespace kt_sft
