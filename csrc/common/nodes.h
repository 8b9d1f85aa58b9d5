// The NUMA nodes that share the work, and the CPUs of each.
//
// Block rows of every packed matrix are split evenly over the nodes: node n of N owns [n B / N, (n + 1) B / N) of B.
// Its threads fill and read them; where memory is placed by first touch, they lie on its node. Nodes without CPUs are
// made up: the work is split as if they were there, nothing is bound.
#pragma once
#include <cstdint>
#include <vector>

namespace kt_sft {

constexpr int kMaxNodes = 16;  // two sockets, each split into four (SNC4, NPS4), twice over

struct Nodes {
  std::vector<std::vector<int>> cpus;  // of each node: for every node or for none
  std::vector<int> node_of_cpu;        // -1: of none
  std::vector<int> share;              // threads are dealt in proportion to the CPUs

  int count() const { return static_cast<int>(cpus.size()); }
  bool bound() const { return !cpus[0].empty(); }
  int of_thread(int thread, int threads) const;
  int of_caller() const;      // where the calling thread runs now, so that it begins with work that is near
  void bind(int node) const;  // keeps the calling thread on the node's CPUs
};

const Nodes& nodes();  // one that is not bound, unless set
// One list of CPUs for each node, all of which this process may use, or empty lists. Takes effect at the next loop.
void set_nodes(const std::vector<std::vector<int>>& cpus);

// Tasks [end[n - 1], end[n]) are those of node n.
struct NodeTasks {
  int nodes = 1;
  int64_t end[kMaxNodes] = {};
  int64_t begin(int node) const { return node > 0 ? end[node - 1] : 0; }
  int64_t total() const { return end[nodes - 1]; }
};

// The even split above, of `count` block rows or of whatever is laid out like them.
inline NodeTasks split_over_nodes(int64_t count, int num_nodes) {
  NodeTasks split;
  split.nodes = num_nodes;
  for (int n = 0; n < num_nodes; ++n) split.end[n] = count * (n + 1) / num_nodes;
  return split;
}

}  // namespace kt_sft
