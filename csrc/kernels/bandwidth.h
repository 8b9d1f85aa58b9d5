// Measured read bandwidth of all threads together, for the benchmarks.
#pragma once
#include <cstdint>

namespace kt_sft {

// Bytes per second: every thread reads its own buffer `passes` times with the widest loads of the selected ISA; the
// best of several prefetch distances. Anonymous memory on 2 MiB pages (where the system gives them) or on 4 KiB pages.
double read_bandwidth(int64_t bytes_per_thread, int64_t passes, bool huge_pages);

}  // namespace kt_sft
