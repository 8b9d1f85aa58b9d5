// Weights into and out of the packed block layout.
#pragma once
#include <cstdint>

#include "kernels/panel.h"

namespace kt_sft {

constexpr bool quantises(Format format) {
  return format == Format::bf16 || format == Format::int8 || format == Format::int4;
}

// Quantise and pack a row-major (rows, cols) matrix, bf16 bits or fp32, in a format that quantises().
// Returns false if a weight is NaN or Inf.
bool pack_matrix(const PackedMatrix& dst, const void* weights, bool is_float);

// The kernels multiply scales of fp8 by 2^120 (Fp8 in formats.h): they have to be below this.
constexpr float kFp8ScalesBelow = 256;

// Codes that are quantised already, as they are.
//   codes   row-major, source_row_bytes per row: for 4 bits the even column in the low nibble, signed ones as code + 8;
//           GGUF's super-blocks of 256 columns as they are
//   planes  one per plane of the format: row-major (rows, or row blocks where a plane has one lane; groups) elements
int source_columns(Format format);  // the columns are a multiple of
int64_t source_row_bytes(Format format, int cols);
void pack_codes(const PackedMatrix& dst, const uint8_t* codes, const uint8_t* const* planes);

// The codes and scales of a matrix of the same format and sizes, each block row by a thread of the node that owns it.
void copy_matrix(const PackedMatrix& dst, const PackedMatrix& src);

// The exact weights: out (rows, cols).
void unpack_matrix(const PackedMatrix& src, float* out);

}  // namespace kt_sft
