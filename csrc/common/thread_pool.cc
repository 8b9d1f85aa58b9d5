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
#include "common/nodes.h"

namespace kt_sft {
namespace {

constexpr auto kSpin = std::chrono::microseconds(200);  // longer than the gap between two calls of a decoding loop

constexpr uint32_t kClosed = uint32_t{1} << 31;

// A word that threads wait on; waking costs a system call only if a thread sleeps.
struct Signal {
  std::atomic<uint32_t> value;
  std::atomic<int> sleepers{0};

  // Returns once value != old: spins first, then sleeps.
  void wait_change(uint32_t old) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (value.load(std::memory_order_acquire) == old) {
      for (int i = 0; i < 64; ++i) _mm_pause();
      if (std::chrono::steady_clock::now() > until) break;
    }
    if (value.load(std::memory_order_acquire) != old) return;
    sleepers.fetch_add(1);  // before the kernel compares: whoever changes value after that sees a sleeper
    while (value.load() == old)
      syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    sleepers.fetch_sub(1);
  }

  // After a sequentially consistent change of value.
  void wake_all() {
    if (sleepers.load() > 0)
      syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
};

// The caller opens a loop, drains it together with the workers that come in time, closes it and waits for those
// inside: a worker that the system has not scheduled yet delays nobody.
// Tasks come in groups, one for each node; a thread takes those of its own node first and then helps the others.
struct Pool {
  Pool(int threads, const Nodes& nodes) : threads(threads), nodes(nodes) {
    for (int i = 1; i < threads; ++i) std::thread([this, i] { worker(i); }).detach();
  }

  void worker(int thread) {
    const int node = nodes.of_thread(thread, threads);
    nodes.bind(node);
    for (uint32_t seen = 0;;) {
      loops.wait_change(seen);
      seen = loops.value.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      if (!enter()) continue;
      drain(thread, node);
      leave();
    }
  }

  bool enter() {
    uint32_t count = inside.value.load(std::memory_order_relaxed);
    do {
      if (count & kClosed) return false;
    } while (!inside.value.compare_exchange_weak(count, count + 1, std::memory_order_acq_rel));
    return true;
  }

  void leave() {
    if (inside.value.fetch_sub(1) - 1 == kClosed) inside.wake_all();
  }

  void drain(int thread, int node) {
    for (int i = 0; i < tasks.nodes; ++i) {
      const int group = (node + i) % tasks.nodes;
      for (int64_t t; (t = next[group].task.fetch_add(1, std::memory_order_relaxed)) < tasks.end[group];)
        fn(context, t, thread);
    }
  }

  void run(const NodeTasks& node_tasks, TaskFn task_fn, void* task_context) {
    tasks = node_tasks, fn = task_fn, context = task_context;
    for (int n = 0; n < tasks.nodes; ++n) next[n].task.store(tasks.begin(n), std::memory_order_relaxed);
    inside.value.store(0, std::memory_order_release);
    loops.value.fetch_add(1);
    loops.wake_all();
    drain(0, nodes.of_caller());
    inside.value.fetch_or(kClosed, std::memory_order_acq_rel);
    for (uint32_t left; (left = inside.value.load(std::memory_order_acquire)) != kClosed;) inside.wait_change(left);
  }

  void shut_down() {
    stop.store(true, std::memory_order_relaxed);
    loops.value.fetch_add(1);
    loops.wake_all();
  }

  struct alignas(64) Counter {
    std::atomic<int64_t> task{0};
  };

  const int threads;
  const Nodes& nodes;
  std::atomic<bool> stop{false};
  NodeTasks tasks;  // these three: written while no worker is inside
  TaskFn fn = nullptr;
  void* context = nullptr;
  Counter next[kMaxNodes];
  alignas(64) Signal loops{{0}};         // counts the loops
  alignas(64) Signal inside{{kClosed}};  // workers in the loop, and whether more may come
};

// The siblings of one core share its vector and tile units: its list of CPUs names the core.
std::string core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  std::string siblings;
  std::getline(file, siblings);
  return siblings.empty() ? std::to_string(cpu) : siblings;
}

// Physical cores among the CPUs of the nodes, or else among those that this process may use.
int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set) && (!nodes().bound() || nodes().node_of_cpu[cpu] >= 0)) cores.insert(core_of(cpu));
  return cores.empty() ? 1 : static_cast<int>(cores.size());
}

// Leaked on purpose: workers may outlive main() and a static destructor must not pull memory from under them.
Pool* pool = nullptr;
std::mutex* pool_mutex = new std::mutex;
std::atomic<int> wanted_threads{0};  // 0: not chosen yet

void forget_after_fork() {
  pool = nullptr;  // its threads live in the parent only
  pool_mutex = new std::mutex;
}

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, forget_after_fork);

}  // namespace

int num_threads() {
  int threads = wanted_threads.load(std::memory_order_relaxed);
  if (threads > 0) return threads;
  const int cores = available_cores();
  return wanted_threads.compare_exchange_strong(threads, cores) ? cores : threads;
}

void set_num_threads(int threads) {
  KT_CHECK(threads >= 1, "num_threads: expected at least 1, got ", threads);
  wanted_threads = threads;
}

void run_tasks(const NodeTasks& tasks, TaskFn fn, void* context) {
  const int64_t total = tasks.total();
  const int threads = num_threads();  // once: another thread may change it meanwhile
  if (threads == 1 || total <= 1) {
    for (int64_t t = 0; t < total; ++t) fn(context, t, 0);
    return;
  }
  std::lock_guard<std::mutex> lock(*pool_mutex);
  const Nodes& here = nodes();
  if (pool == nullptr || pool->threads != threads || &pool->nodes != &here) {
    if (pool != nullptr) pool->shut_down();  // its few bytes stay: workers are still returning from them
    pool = new Pool(threads, here);
  }
  pool->run(tasks, fn, context);
}

}  // namespace kt_sft
