#include "common/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace kt_sft {
namespace {

struct Regs {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Regs cpuid(uint32_t leaf, uint32_t subleaf) {
  Regs r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return Regs{};
  return r;
}

uint64_t xcr0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
}

bool bit(uint32_t value, int index) { return (value >> index) & 1; }

bool is_amd() { return cpuid(0, 0).ebx == 0x68747541; }  // the first letters of AuthenticAMD
uint32_t family(const Regs& l1) { return (l1.eax >> 8 & 0xf) + (l1.eax >> 20 & 0xff); }  // of processors since 2003

// Linux >= 5.16 grants the 8 KiB of tile data per process on request (Documentation/arch/x86/xstate.rst).
bool request_tile_data() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
}

CpuFeatures detect() {
  CpuFeatures f{};
  const Regs l1 = cpuid(1, 0), l7 = cpuid(7, 0), l7_1 = cpuid(7, 1);
  if (!bit(l1.ecx, 27)) return f;  // OSXSAVE: without it XGETBV faults
  const uint64_t state = xcr0();
  const bool os_ymm = (state & 0x6) == 0x6, os_zmm = (state & 0xe6) == 0xe6;
  const bool os_tiles = (state & 0x60000) == 0x60000;
  f.avx2_fma = os_ymm && bit(l7.ebx, 5) && bit(l1.ecx, 12) && bit(l1.ecx, 29);
  f.avx512 = f.avx2_fma && os_zmm && bit(l7.ebx, 16) && bit(l7.ebx, 17) && bit(l7.ebx, 30) && bit(l7.ebx, 31);
  f.avx512_bf16 = f.avx512 && bit(l7_1.eax, 5) && bit(l7.ecx, 11) && bit(l7.ecx, 1);
  f.amx_bf16 =
      f.avx512_bf16 && os_tiles && bit(l7.edx, 24) && bit(l7.edx, 22) && bit(l7.edx, 25) && request_tile_data();
  f.halves_512 = f.avx512 && is_amd() && family(l1) == 0x19;
  return f;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace kt_sft
