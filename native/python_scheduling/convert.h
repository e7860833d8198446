// Choices and chunks as the tuples that the Python package makes named tuples of.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "doubleweave/scheduling/planner.h"

namespace doubleweave::python {

using ChunkTuple = std::tuple<int, int, int>;
using ChoiceTuple = std::tuple<std::string, std::vector<std::string>, int, int, int, int>;

inline std::vector<ChunkTuple> to_tuples(const std::vector<scheduling::Chunk>& chunks) {
  std::vector<ChunkTuple> found;
  for (const auto& [start, num_tokens, compiled_size] : chunks) {
    found.emplace_back(start, num_tokens, compiled_size);
  }
  return found;
}

inline std::vector<scheduling::Chunk> to_chunks(const std::vector<ChunkTuple>& tuples) {
  std::vector<scheduling::Chunk> chunks;
  for (const auto& [start, num_tokens, compiled_size] : tuples) {
    chunks.push_back({start, num_tokens, compiled_size});
  }
  return chunks;
}

inline ChoiceTuple to_tuple(const scheduling::Choice& choice) {
  return {choice.schedule, choice.workers,   choice.threads,
          choice.chunk,    choice.in_flight, choice.abreast};
}

inline scheduling::Choice to_choice(const ChoiceTuple& tuple) {
  const auto& [schedule, workers, threads, chunk, in_flight, abreast] = tuple;
  return {schedule, workers, threads, chunk, in_flight, abreast};
}

inline scheduling::Wish to_wish(const std::string& schedule,
                                const std::optional<std::vector<std::string>>& workers,
                                std::optional<int> chunk, int threads) {
  return {schedule, workers.value_or(std::vector<std::string>{}), chunk, threads};
}

}  // namespace doubleweave::python
