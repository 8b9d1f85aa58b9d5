// Chooses the kernels at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/check.h"
#include "common/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt_sft {

#define KT_ISA(name, feature, chosen) \
  namespace name {                    \
  const KernelTable& table();         \
  }
#include "kernels/registry.inc"

namespace {

struct Isa {
  const char* name;
  const KernelTable& (*table)();
  bool CpuFeatures::* feature;
  bool chosen;  // by default, not only on request
};

constexpr Isa kIsas[] = {
#define KT_ISA(name, feature, chosen) {#name, name::table, &CpuFeatures::feature, chosen},
#include "kernels/registry.inc"
};

std::string runnable_names() {
  std::string names;
  for (const Isa& isa : kIsas)
    if (cpu_features().*isa.feature) names += (names.empty() ? "" : ", ") + std::string(isa.name);
  return names.empty() ? "none (AVX2 and FMA are the least that is supported)" : names;
}

const KernelTable* find(const char* name) {
  const bool any = name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0;
  for (const Isa& isa : kIsas) {
    if (any ? !isa.chosen : std::strcmp(isa.name, name) != 0) continue;
    if (cpu_features().*isa.feature) return &isa.table();
    KT_CHECK(any, "KT_SFT_ISA: this CPU (or its operating system) cannot run '", name,
             "'; it can run: ", runnable_names());
  }
  KT_CHECK(!any, "unsupported CPU: kt_sft needs AVX2 and FMA at least");
  std::string known;
  for (const Isa& isa : kIsas) known += (known.empty() ? "" : ", ") + std::string(isa.name);
  fail("KT_SFT_ISA: unknown '", name, "'; expected auto or one of: ", known);
}

std::atomic<const KernelTable*> selected{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = selected.load(std::memory_order_acquire);
  if (table == nullptr) {
    select_isa(std::getenv("KT_SFT_ISA"));
    table = selected.load(std::memory_order_acquire);
  }
  return *table;
}

void select_isa(const char* name) { selected.store(find(name), std::memory_order_release); }

const char* const* runnable_isas(int* count) {
  static const char* names[sizeof(kIsas) / sizeof(kIsas[0])];
  *count = 0;
  for (const Isa& isa : kIsas)
    if (cpu_features().*isa.feature) names[(*count)++] = isa.name;
  return names;
}

}  // namespace kt_sft
