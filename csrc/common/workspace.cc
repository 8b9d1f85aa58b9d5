#include "common/workspace.h"

#include "common/huge_pages.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace kt_sft {
namespace {

std::mutex* arena_mutex = new std::mutex;  // never destroyed: a call may be running at interpreter exit
char* arena = nullptr;
size_t arena_bytes = 0;
bool poison = false;

void grow(size_t bytes) {
  if (bytes <= arena_bytes) return;
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (arena != nullptr) munmap(arena, arena_bytes);
  arena = nullptr, arena_bytes = 0;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  arena = static_cast<char*>(memory), arena_bytes = bytes;
}

void replace_lock_after_fork() { arena_mutex = new std::mutex; }

}  // namespace

Workspace::Workspace() {
  static const int registered = pthread_atfork(nullptr, nullptr, replace_lock_after_fork);
  (void)registered;
  lock_ = std::unique_lock<std::mutex>(*arena_mutex);
}

char* Workspace::take_bytes(size_t bytes) {
  char* at = base_ == nullptr ? nullptr : base_ + used_;
  used_ += (bytes + 63) / 64 * 64;
  return at;
}

void Workspace::reserve() {
  grow(used_);
  if (poison)
    std::fill_n(reinterpret_cast<uint16_t*>(arena), arena_bytes / 2, uint16_t{0x7fc0});  // NaN as bf16 and fp32
  base_ = arena, used_ = 0;
}

size_t Workspace::capacity() { return arena_bytes; }
void Workspace::set_poison(bool on) { poison = on; }

}  // namespace kt_sft
