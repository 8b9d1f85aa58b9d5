#include "common/thread_pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "common/check.h"

namespace kt_sft {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);  // longer than the gap between two loops of one layer

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Returns once word != old: spins first, then sleeps.
void wait_change(std::atomic<uint32_t>& word, uint32_t old) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  while (word.load(std::memory_order_acquire) == old) {
    for (int i = 0; i < 64; ++i) _mm_pause();
    if (std::chrono::steady_clock::now() > until) break;
  }
  while (word.load(std::memory_order_acquire) == old) futex_wait(word, old);
}

struct Pool {
  explicit Pool(int threads) : threads(threads) {
    for (int i = 1; i < threads; ++i) std::thread([this, i] { worker(i); }).detach();
  }

  void worker(int thread) {
    for (uint32_t seen = 0;;) {
      wait_change(generation, seen);
      seen = generation.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) {
        leave();
        return;
      }
      drain(thread);
      leave();
    }
  }

  void leave() {
    if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      done.fetch_add(1, std::memory_order_release);
      futex_wake_all(done);
    }
  }

  void drain(int thread) {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(context, t, thread);
  }

  void start(int64_t count, TaskFn task_fn, void* task_context) {
    tasks = count, fn = task_fn, context = task_context;
    next.store(0, std::memory_order_relaxed);
    busy.store(threads - 1, std::memory_order_relaxed);
    generation.fetch_add(1, std::memory_order_release);
    futex_wake_all(generation);
  }

  void run(int64_t count, TaskFn task_fn, void* task_context) {
    const uint32_t before = done.load(std::memory_order_relaxed);
    start(count, task_fn, task_context);
    drain(0);
    wait_change(done, before);
  }

  void shut_down() {
    if (threads == 1) return;
    const uint32_t before = done.load(std::memory_order_relaxed);
    stop.store(true, std::memory_order_relaxed);
    start(0, nullptr, nullptr);
    wait_change(done, before);
  }

  const int threads;
  std::atomic<bool> stop{false};
  int64_t tasks = 0;
  TaskFn fn = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> busy{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<uint32_t> done{0};
};

// The siblings of one core share its vector and tile units: its list of CPUs names the core.
std::string core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  std::string siblings;
  std::getline(file, siblings);
  return siblings.empty() ? std::to_string(cpu) : siblings;
}

// Physical cores among the CPUs that this process may use.
int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cores.insert(core_of(cpu));
  return cores.empty() ? 1 : static_cast<int>(cores.size());
}

// Leaked on purpose: workers may outlive main() and a static destructor must not pull memory from under them.
Pool* pool = nullptr;
std::mutex* pool_mutex = new std::mutex;
int wanted_threads = 0;

void forget_after_fork() {
  pool = nullptr;  // its threads live in the parent only
  pool_mutex = new std::mutex;
}

int wanted() { return wanted_threads > 0 ? wanted_threads : (wanted_threads = available_cores()); }

}  // namespace

int num_threads() { return wanted(); }

void set_num_threads(int threads) {
  KT_CHECK(threads >= 1, "num_threads: expected at least 1, got ", threads);
  wanted_threads = threads;
}

void run_tasks(int64_t tasks, TaskFn fn, void* context) {
  if (tasks <= 0) return;
  if (wanted() == 1 || tasks == 1) {
    for (int64_t t = 0; t < tasks; ++t) fn(context, t, 0);
    return;
  }
  std::lock_guard<std::mutex> lock(*pool_mutex);
  if (pool == nullptr || pool->threads != wanted()) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
    (void)registered;
    if (pool != nullptr) pool->shut_down();  // its few bytes stay: a worker may still be returning from them
    pool = new Pool(wanted());
  }
  pool->run(tasks, fn, context);
}

}  // namespace kt_sft
