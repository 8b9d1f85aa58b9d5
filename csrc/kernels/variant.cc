// One ISA's kernels; compiled once per row of the ISA table with that ISA's flags and KT_SFT_VARIANT = its name.
// Everything lives in the variant's own namespace: an inline function shared with another variant could be merged by
// the linker into the one with instructions that the CPU lacks.
#include <immintrin.h>

#include "kernels/kernel_table.h"

namespace kt_sft {
namespace KT_SFT_VARIANT {

#include "kernels/fma_block.h"
#include "kernels/formats.h"
#if defined(__AMX_BF16__) || defined(KT_SFT_TILE_MODEL)
#include "kernels/tile_ops_amx.h"
using ActiveOps = AmxOps;
#elif defined(__AVX512F__)
#include "kernels/tile_ops_avx512.h"
using ActiveOps = Ops;
#else
#include "kernels/tile_ops_avx2.h"
using ActiveOps = Ops;
#endif
#include "kernels/gemm.h"
#include "kernels/elementwise.h"
#include "kernels/quantize.h"

#define KT_STRING_(x) #x
#define KT_STRING(x) KT_STRING_(x)
const KernelTable& table() {
  static constexpr KernelTable kTable{KT_STRING(KT_SFT_VARIANT),
                                      kTileElems * sizeof(Ops::Elem),
                                      kScratchBytes,
                                      pack_tiles,
                                      gemm,
                                      swiglu,
                                      swiglu_hidden,
                                      swiglu_backward,
                                      to_bf16_row,
                                      quantize_strip,
                                      ActiveOps::peak};
  return kTable;
}

}  // namespace KT_SFT_VARIANT
}  // namespace kt_sft
