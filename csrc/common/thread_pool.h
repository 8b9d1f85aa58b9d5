// A persistent pool: parallel_for over independent tasks, the calling thread takes part.
//
// Tasks may belong to nodes: idle threads take those of their own node first. Which thread runs a task is left open, so
// tasks must not share outputs; results are then the same for any number of threads. Workers spin briefly after a
// loop, through those of one layer and to the next token's, then sleep on a futex. The pool is never destroyed (safe at
// interpreter exit) and a forked child starts a new one on first use.
#pragma once
#include <cstdint>
#include <utility>

#include "common/nodes.h"

namespace kt_sft {

using TaskFn = void (*)(void* context, int64_t task, int thread);

int num_threads();                  // by default the physical cores that this process may use
void set_num_threads(int threads);  // >= 1; takes effect at the next loop
void run_tasks(const NodeTasks& tasks, TaskFn fn, void* context);

// fn(task, thread), thread in [0, num_threads()).
template <class Fn>
void parallel_for(const NodeTasks& tasks, Fn&& fn) {
  run_tasks(
      tasks, [](void* context, int64_t task, int thread) { (*static_cast<Fn*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}
template <class Fn>
void parallel_for(int64_t tasks, Fn&& fn) {
  parallel_for(split_over_nodes(tasks, 1), std::forward<Fn>(fn));
}

}  // namespace kt_sft
