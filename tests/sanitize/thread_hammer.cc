// Hammers the thread pool and the workspace from several threads, for ThreadSanitizer and AddressSanitizer.
//   thread_hammer          three callers, a thread that changes the number of threads and of nodes
//   thread_hammer fork     the same while children are forked (ThreadSanitizer cannot follow those)
//   thread_hammer race     races on purpose
//   thread_hammer nodes    idle threads take the tasks of their own node
// Says what failed and exits with 1, or exits with 0.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "common/nodes.h"
#include "common/thread_pool.h"
#include "common/workspace.h"

namespace {

using kt_sft::parallel_for;

constexpr int kMaxThreads = 4;
std::atomic<bool> failed{false};

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "thread_hammer: %s\n", what);
  failed = true;
}

// Every task of a loop runs once, and what it wrote is seen by the caller.
void count_tasks(int round) {
  const int tasks = 1 + round * 7 % 61;
  std::vector<int> runs(tasks, 0);  // plain ints: the pool alone orders the accesses
  parallel_for(kt_sft::split_over_nodes(tasks, 1 + round % 5), [&](int64_t task, int thread) {
    runs[task] += 1 + round;
    expect(thread >= 0 && thread < kMaxThreads, "thread number out of range");
  });
  for (const int count : runs) expect(count == 1 + round, "a task did not run exactly once");
}

// Two buffers of a call hold what its tasks wrote, though other threads want the arena too.
void fill_workspace(int round) {
  const int words = 64 + round % 5 * 300000;  // grows now and then
  kt_sft::Workspace workspace;
  int *first = nullptr, *second = nullptr;
  const auto take = [&] { first = workspace.take<int>(words), second = workspace.take<int>(32); };
  take();
  workspace.reserve();
  take();
  parallel_for(32, [&](int64_t task, int) {
    second[task] = static_cast<int>(task);
    for (int64_t i = task; i < words; i += 32) first[i] = round;
  });
  for (int i = 0; i < words; i += 17) expect(first[i] == round, "a buffer of the workspace was overwritten");
  for (int i = 0; i < 32; ++i) expect(second[i] == i, "a small buffer of the workspace was overwritten");
}

void call(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    count_tasks(round);
    if (round % 8 == 0) fill_workspace(round);
  }
}

// A child that is forked while other threads are in the middle of a loop has a pool and a workspace of its own.
void fork_child() {
  const pid_t child = fork();
  if (child == 0) {
    call(16);
    _exit(failed ? 1 : 0);
  }
  int status = -1;
  expect(child > 0 && waitpid(child, &status, 0) == child, "fork failed");
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked child failed");
}

// Every thread is held in its first task until all threads have one, so each can run one only: it must be of its node.
void take_own_tasks(int nodes, int threads) {
  kt_sft::set_nodes(std::vector<std::vector<int>>(nodes));
  kt_sft::set_num_threads(threads);
  std::vector<int> node_of_task(threads), runner(threads, -1);
  for (int t = 0; t < threads; ++t) node_of_task[t] = kt_sft::nodes().of_thread(t, threads);
  kt_sft::NodeTasks tasks;
  tasks.nodes = nodes;
  for (int t = 0; t < threads; ++t)
    for (int n = node_of_task[t]; n < nodes; ++n) ++tasks.end[n];
  std::atomic<int> started{0};
  parallel_for(tasks, [&](int64_t task, int thread) {
    runner[task] = thread;
    ++started;
    while (started < threads) std::this_thread::yield();
  });
  for (int t = 0; t < threads; ++t)
    expect(node_of_task[runner[t]] == node_of_task[t], "an idle thread took a task of another node");
}

void race() {
  int shared = 0;
  std::atomic<int> arrived{0};
  parallel_for(2, [&](int64_t, int) {
    arrived.fetch_add(1, std::memory_order_relaxed);  // orders nothing
    while (arrived.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    ++shared;
  });
  std::fprintf(stderr, "raced: %d\n", shared);
}

}  // namespace

int main(int argc, char** argv) {
  kt_sft::set_num_threads(kMaxThreads);
  const char* const mode = argc > 1 ? argv[1] : "";
  if (std::strcmp(mode, "race") == 0) {
    race();
    return 0;
  }
  if (std::strcmp(mode, "nodes") == 0) {
    for (int round = 0; round < 50; ++round)
      for (const int nodes : {1, 2, 3, 4})
        for (const int threads : {1, 4, 6}) take_own_tasks(nodes, threads);
    return failed ? 1 : 0;
  }
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(call, 150);
  std::thread changer([&] {
    for (int i = 0; !stop; ++i) {
      kt_sft::set_num_threads(1 + i % kMaxThreads);
      if (i % 8 == 0) kt_sft::set_nodes(std::vector<std::vector<int>>(1 + i / 8 % 3));
      expect(kt_sft::num_threads() >= 1 && kt_sft::Workspace::capacity() % 64 == 0, "a setting is out of range");
      std::this_thread::yield();
    }
  });
  for (int i = 0; i < 10 && std::strcmp(mode, "fork") == 0; ++i) fork_child();
  for (auto& caller : callers) caller.join();
  stop = true;
  changer.join();
  return failed ? 1 : 0;
}
