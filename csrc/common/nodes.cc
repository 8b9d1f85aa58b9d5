#include "common/nodes.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>

#include "common/check.h"

namespace kt_sft {
namespace {

// Replaced, never changed or freed: workers of an earlier pool may still read the old ones.
std::atomic<const Nodes*> current{new Nodes{{{}}, {}, {1}}};

}  // namespace

int Nodes::of_thread(int thread, int threads) const {
  int total = 0;
  for (const int n : share) total += n;
  int place = static_cast<int>(int64_t{thread} * total / threads), node = 0;
  while (place >= share[node]) place -= share[node++];
  return node;
}

int Nodes::of_caller() const {
  if (!bound()) return 0;
  const int cpu = sched_getcpu();
  return cpu >= 0 && cpu < static_cast<int>(node_of_cpu.size()) ? std::max(node_of_cpu[cpu], 0) : 0;
}

void Nodes::bind(int node) const {
  if (!bound()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus[node]) CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // fails if the CPUs were taken away since: then unbound
}

const Nodes& nodes() { return *current.load(std::memory_order_acquire); }

void set_nodes(const std::vector<std::vector<int>>& cpus) {
  KT_CHECK(!cpus.empty() && cpus.size() <= kMaxNodes, "NUMA nodes: expected 1 to ", kMaxNodes, ", got ", cpus.size());
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  KT_CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0, "NUMA nodes: the CPUs of this process cannot be read");
  Nodes made{cpus, std::vector<int>(CPU_SETSIZE, -1), {}};
  for (int node = 0; node < made.count(); ++node) {
    KT_CHECK(cpus[node].empty() != made.bound(),
             "NUMA nodes: expected CPUs for every node or for none, got none for node ", cpus[node].empty() ? node : 0);
    made.share.push_back(std::max(static_cast<int>(cpus[node].size()), 1));
    for (const int cpu : cpus[node]) {
      KT_CHECK(cpu >= 0 && cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed), "NUMA nodes: CPU ", cpu, " of node ", node,
               " is not one that this process may use");
      KT_CHECK(made.node_of_cpu[cpu] < 0, "NUMA nodes: CPU ", cpu, " is named twice");
      made.node_of_cpu[cpu] = node;
    }
  }
  current.store(new Nodes(std::move(made)), std::memory_order_release);
}

}  // namespace kt_sft
