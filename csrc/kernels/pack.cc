#include "kernels/pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/thread_pool.h"
#include "kernels/kernel_table.h"

namespace kt_sft {

bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float) {
  std::atomic<bool> finite{true};
  parallel_for(split_over_nodes(dst.row_blocks(), nodes().count()), [&](int64_t nb, int) {
    if (!kernels().quantize_strip({weights, is_float, &dst, static_cast<int>(nb)})) finite = false;
  });
  return finite;
}

// Bytes of a GGUF super-block of 256 weights; 0 for formats that have none.
static constexpr int super_block_bytes(Format format) {
  return format == Format::q4_k ? 144 : format == Format::q5_k ? 176 : format == Format::q6_k ? 210 : 0;
}

int source_columns(Format format) { return super_block_bytes(format) > 0 ? 256 : 2; }

int64_t source_row_bytes(Format format, int cols) {
  if (const int bytes = super_block_bytes(format)) return int64_t{cols} / 256 * bytes;
  return info(format).bits == 4 ? cols / 2 : cols;
}

namespace {

constexpr int kParts = 256 / kBlock;  // of a super-block

// What is stored differs from the code + 8 that comes in: four bits of two's complement differ in the highest.
constexpr uint32_t flipped_bits(Format format) {
  return format == Format::int4_sym || format == Format::q4_0 ? 0x88888888u : 0;
}

// The 32 codes of part j of a GGUF super-block of 256 weights (ggml-common.h of llama.cpp: block_q4_K ...).
void q4_k_codes(const uint8_t* block, int j, uint8_t* codes) {
  const uint8_t* low = block + 16 + j / 2 * 32;
  for (int i = 0; i < kBlock; ++i) codes[i] = low[i] >> j % 2 * 4 & 15;
}

void q5_k_codes(const uint8_t* block, int j, uint8_t* codes) {
  const uint8_t *high = block + 16, *low = block + 48 + j / 2 * 32;
  for (int i = 0; i < kBlock; ++i)
    codes[i] = static_cast<uint8_t>((low[i] >> j % 2 * 4 & 15) | (high[i] >> j & 1) << 4);
}

void q6_k_codes(const uint8_t* block, int j, uint8_t* codes) {
  const int part = j % 4;
  const uint8_t *low = block + j / 4 * 64 + part % 2 * 32, *high = block + 128 + j / 4 * 32;
  for (int i = 0; i < kBlock; ++i)
    codes[i] = static_cast<uint8_t>((low[i] >> part / 2 * 4 & 15) | (high[i] >> part * 2 & 3) << 4);
}

// The codes of a block's row as they come: nibbles of pairs for 4 bits, else bytes. Zeros beyond the matrix.
template <int kBits>
void read_row(const PackedMatrix& m, const uint8_t* row, int kb, uint8_t* codes) {
  constexpr int kBytes = kBits == 4 ? kPairs : kBlock;
  const int columns = std::min(kBlock, m.cols - kb * kBlock);
  const int super = super_block_bytes(m.format);
  if (super == 0) {
    std::memset(codes, 0, kBytes);
    std::memcpy(codes, row + kb * kBytes, columns * kBytes / kBlock);
    return;
  }
  const uint8_t* block = row + int64_t{kb / kParts} * super;
  if constexpr (kBits == 6) {
    q6_k_codes(block, kb % kParts, codes);
  } else if constexpr (kBits == 5) {
    q5_k_codes(block, kb % kParts, codes);
  } else {
    uint8_t bytes[kBlock];
    q4_k_codes(block, kb % kParts, bytes);
    for (int p = 0; p < kPairs; ++p) codes[p] = static_cast<uint8_t>(bytes[2 * p] | bytes[2 * p + 1] << 4);
  }
}

// Codes of 32 rows -> the block: see panel.h.
template <int kBits>
void store_block(const uint8_t (*codes)[kBlock], uint8_t* block) {
  for (int p = 0; p < kPairs; ++p)
    for (int i = 0; i < kBlock; ++i) {
      if constexpr (kBits == 8) {
        std::memcpy(block + (p * kBlock + i) * 2, codes[i] + 2 * p, 2);
      } else {
        block[p * kBlock + i] = static_cast<uint8_t>((codes[i][2 * p] & 15) | codes[i][2 * p + 1] << 4);
      }
    }
  if constexpr (kBits == 5 || kBits == 6) {
    constexpr int kHigh = kBits - 4, kPairsPerByte = 4 / kHigh;
    for (int b = 0; b < kPairs / kPairsPerByte; ++b)
      for (int i = 0; i < kBlock; ++i) {
        int bits = 0;
        for (int k = 0; k < 2 * kPairsPerByte; ++k) bits |= codes[i][b * 2 * kPairsPerByte + k] >> 4 << k * kHigh;
        block[(kPairs + b) * kBlock + i] = static_cast<uint8_t>(bits);
      }
  }
}

// Nibbles of pairs -> words of four first and four second columns.
void store_nibbles(const uint8_t (*codes)[kBlock], uint32_t flip, uint8_t* block) {
  for (int i = 0; i < kBlock; ++i)
    for (int w = 0; w < kPairs / 4; ++w) {
      uint32_t pairs;
      std::memcpy(&pairs, codes[i] + 4 * w, 4);
      pairs ^= flip;
      const auto every_other = [](uint32_t nibbles) {
        const uint32_t bytes = nibbles & 0x0f0f0f0f, halves = (bytes | bytes >> 4) & 0x00ff00ff;
        return (halves | halves >> 8) & 0xffff;
      };
      const uint32_t word = every_other(pairs) | every_other(pairs >> 4) << 16;
      std::memcpy(block + (w * kBlock + i) * 4, &word, 4);
    }
}

template <int kBits>
void pack_block(const PackedMatrix& dst, int nb, int kb, const uint8_t* codes, int64_t row_bytes) {
  uint8_t rows[kBlock][kBlock] = {};
  const int count = std::min(kBlock, dst.rows - nb * kBlock);
  for (int i = 0; i < count; ++i) read_row<kBits>(dst, codes + (int64_t{nb} * kBlock + i) * row_bytes, kb, rows[i]);
  auto* block = const_cast<uint8_t*>(dst.block(nb, kb));
  if constexpr (kBits == 4) {
    store_nibbles(rows, flipped_bits(dst.format), block);
  } else {
    store_block<kBits>(rows, block);
  }
}

using PackBlock = void (*)(const PackedMatrix&, int nb, int kb, const uint8_t* codes, int64_t row_bytes);
constexpr PackBlock pack_block_of(int bits) {
  return bits == 4 ? pack_block<4> : bits == 5 ? pack_block<5> : bits == 6 ? pack_block<6> : pack_block<8>;
}

// (rows, groups) elements -> [group][lane]; the lanes of rows that the matrix lacks are zeros.
void pack_plane(const PackedMatrix& dst, int nb, int p, const uint8_t* from) {
  const Plane plane = dst.plane(p);
  const int groups = dst.plane_groups(p), rows = plane.lanes == 1 ? dst.row_blocks() : dst.rows;
  for (int g = 0; g < groups; ++g) {
    auto* to = const_cast<uint8_t*>(dst.in_block(p) ? dst.plane_at(p, nb, g)
                                                    : dst.plane_at(p, nb, 0) + g * dst.group_bytes(p));
    for (int i = 0; i < plane.lanes; ++i, to += plane.bytes) {
      const int64_t row = int64_t{nb} * plane.lanes + i;
      if (row < rows) {
        std::memcpy(to, from + (row * groups + g) * plane.bytes, plane.bytes);
      } else {
        std::memset(to, 0, plane.bytes);
      }
    }
  }
}

}  // namespace

void pack_codes(const PackedMatrix& dst, const uint8_t* codes, const uint8_t* const* planes) {
  const PackBlock pack_block = pack_block_of(info(dst.format).bits);
  const int64_t row_bytes = source_row_bytes(dst.format, dst.cols);
  parallel_for(split_over_nodes(dst.row_blocks(), nodes().count()), [&](int64_t task, int) {
    const int nb = static_cast<int>(task);
    for (int kb = 0; kb < dst.col_blocks(); ++kb) pack_block(dst, nb, kb, codes, row_bytes);
    for (int p = 0; p < kMaxPlanes && dst.plane(p).lanes > 0; ++p) pack_plane(dst, nb, p, planes[p]);
  });
}

void copy_matrix(const PackedMatrix& dst, const PackedMatrix& src) {
  const int64_t blocks = dst.row_blocks(), codes = dst.all_blocks_bytes();
  parallel_for(split_over_nodes(blocks, nodes().count()), [&](int64_t nb, int) {
    const auto copy = [&](int64_t begin, int64_t end) {
      std::memcpy(const_cast<uint8_t*>(dst.codes) + begin, src.codes + begin, end - begin);
    };
    const int64_t scales = codes + nb * dst.scale_row_bytes;
    copy(codes / blocks * nb, codes / blocks * (nb + 1));
    copy(scales, nb + 1 < blocks ? scales + dst.scale_row_bytes : dst.nbytes());  // the last one with the padding
  });
}

void unpack_matrix(const PackedMatrix& src, float* out) {
  parallel_for(src.row_blocks(), [&](int64_t nb, int) { kernels().unpack_strip(src, static_cast<int>(nb), out); });
}

}  // namespace kt_sft
