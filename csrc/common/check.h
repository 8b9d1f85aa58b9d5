// Argument checks that become ValueError in Python (std::invalid_argument is translated by pybind11).
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace kt_sft {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace kt_sft

#define KT_CHECK(condition, ...)                   \
  do {                                             \
    if (!(condition)) ::kt_sft::fail(__VA_ARGS__); \
  } while (0)
