// What the processor and the operating system allow: CPUID, XGETBV and Linux's permission for AMX tile data.
#pragma once

namespace kt_sft {

struct CpuFeatures {
  bool avx2_fma;     // AVX2, FMA and F16C, with the OS saving YMM
  bool avx512;       // F, BW, DQ, VL, with the OS saving ZMM
  bool avx512_bf16;  // avx512, AVX512_BF16 and AVX512_VNNI (every CPU with the one has the other)
  bool amx_bf16;     // avx512_bf16, AMX-TILE, AMX-BF16 and AMX-INT8, with the OS granting tile data to this process
  bool halves_512;   // avx512, each operation in two halves on 256-bit units (Zen 4)
};

// Detected once; asks the kernel for AMX permission on the way (arch_prctl ARCH_REQ_XCOMP_PERM, inherited by threads).
const CpuFeatures& cpu_features();

}  // namespace kt_sft
