// Transparent huge pages for large buffers: fewer page faults when a buffer is first written, fewer TLB misses when
// codes are streamed. Only a wish: where the system has none, nothing changes.
// https://www.kernel.org/doc/html/latest/admin-guide/mm/transhuge.html (madvise)
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace kt_sft {

constexpr size_t kHugePage = size_t{2} << 20;

// The whole huge pages inside [memory, memory + bytes); unless wished for, they are kept small.
inline void advise_huge_pages(void* memory, size_t bytes, bool wish = true) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, wish ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

}  // namespace kt_sft
