// Weights into and out of the packed block layout. Scalar: it runs once per model, behind the quantiser.
#pragma once
#include <cstdint>

#include "kernels/panel.h"

namespace kt_sft {

// codes: row-major (rows, cols), int8 for int8 and int4 (-127..127, -7..7), bf16 bits for bf16.
// scales: row-major (rows, groups) bf16 bits, or null. Writes dst.codes and dst.scales, padding with zeros.
void pack_matrix(const PackedMatrix& dst, const void* codes, const uint16_t* scales);

// The values that products see: out (rows, cols) bf16 bits = bf16_rne(code * scale).
void unpack_matrix(const PackedMatrix& src, uint16_t* out);

}  // namespace kt_sft
