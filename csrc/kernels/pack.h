// Weights into and out of the packed block layout.
#pragma once
#include <cstdint>

#include "kernels/panel.h"

namespace kt_sft {

// Quantise and pack a row-major (rows, cols) matrix, bf16 bits or fp32. Returns false if a weight is NaN or Inf.
bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float);

// Codes that are quantised already, as they are: codes (rows, cols / 2) of int4, each nibble code + 8, the even column
// low; scales (rows, groups) bf16 bits.
void pack_int4_codes(const PackedMatrix& dst, const uint8_t* codes, const uint16_t* scales);

// The values that products see: out (rows, cols) bf16 bits = bf16_rne(code * scale).
void unpack_matrix(const PackedMatrix& src, uint16_t* out);

}  // namespace kt_sft
