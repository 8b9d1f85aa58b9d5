// One ISA's kernels; compiled once per row of the ISA table with that ISA's flags and KT_SFT_VARIANT = its name.
// Everything lives in the variant's own namespace: an inline function shared with another variant could be merged by
// the linker into the one with instructions that the CPU lacks.
#include <immintrin.h>

#include "common/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt_sft {
namespace KT_SFT_VARIANT {

#include "kernels/fma_block.h"
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
#include "kernels/formats.h"
#include "kernels/scales.h"
#include "kernels/gemm.h"
#include "kernels/elementwise.h"
#include "kernels/level_search.h"
#include "kernels/quantize.h"
#include "kernels/unpack.h"
#ifdef __AVX512VNNI__
#include "kernels/gemm8.h"
#endif
#include "kernels/probes.h"

#define KT_STRING_(x) #x
#define KT_STRING(x) KT_STRING_(x)
struct Int8Kernels {
  void (*quantize_rows)(const QuantizeRowsArgs&);
  void (*gemm8)(const Gemm8Args&);
  double (*peak)(int64_t);
};
#ifdef __AVX512VNNI__
constexpr Int8Kernels kInt8{quantize_rows, gemm8, ActiveOps::peak_int8};
constexpr size_t kAllScratchBytes = kScratch8Bytes > kScratchBytes ? kScratch8Bytes : kScratchBytes;
#else
constexpr Int8Kernels kInt8{};
constexpr size_t kAllScratchBytes = kScratchBytes;
#endif

const KernelTable& table() {
  static constexpr KernelTable kTable{KT_STRING(KT_SFT_VARIANT),
                                      kTileElems * sizeof(Ops::Elem),
                                      kAllScratchBytes,
                                      ActiveOps::kWideTasks,
                                      pack_tiles,
                                      gemm,
                                      activate,
                                      activate_backward,
                                      to_bf16_row,
                                      add_scaled_row,
                                      quantize_strip,
                                      unpack_strip,
                                      ActiveOps::peak,
                                      kInt8.quantize_rows,
                                      kInt8.gemm8,
                                      kInt8.peak,
                                      read_stream};
  return kTable;
}

}  // namespace KT_SFT_VARIANT
}  // namespace kt_sft
