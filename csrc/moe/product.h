// One plain product with a packed matrix, in either direction: what a layer is made of, alone for tests and benchmarks.
#pragma once
#include "kernels/kernel_table.h"

namespace kt_sft {

// Side::left:  out (m, n) = act (m, k) W^T      Side::right: out (m, k) = act (m, n) W
// act bf16 row-major, out fp32 row-major, overwritten.
void packed_product(const PackedMatrix& weights, Side side, const uint16_t* act, int64_t m, float* out);

// The same in native int8, with the activations quantised in groups; of Side::right after W's scales were folded into
// them. The ISA must have int8 products.
void packed_product8(const PackedMatrix& weights, Side side, const uint16_t* act, int64_t m, int group, float* out);

}  // namespace kt_sft
