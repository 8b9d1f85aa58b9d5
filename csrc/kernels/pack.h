// Weights into and out of the packed block layout.
#pragma once
#include <cstdint>

#include "kernels/panel.h"

namespace kt_sft {

// Quantise and pack a row-major (rows, cols) matrix, bf16 bits or fp32. Returns false if a weight is NaN or Inf.
bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float);

// The values that products see: out (rows, cols) bf16 bits = bf16_rne(code * scale).
void unpack_matrix(const PackedMatrix& src, uint16_t* out);

}  // namespace kt_sft
