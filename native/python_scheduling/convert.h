// Chunks, choices and their kin as the tuples that the Python package makes named tuples of.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "doubleweave/scheduling/planner.h"

namespace nanobind::detail {

// A struct as the tuple of these fields, in both directions.
template <typename Struct, auto... kFields>
struct fields_caster {
  using Tuple = std::tuple<std::remove_cvref_t<decltype(std::declval<Struct>().*kFields)>...>;
  NB_TYPE_CASTER(Struct, make_caster<Tuple>::Name)

  bool from_python(handle source, uint32_t flags, cleanup_list* cleanup) noexcept {
    make_caster<Tuple> caster;
    const bool fits = caster.from_python(source, flags, cleanup);
    if (fits) {
      std::tie(value.*kFields...) = static_cast<Tuple>(caster);
    }
    return fits;
  }

  static handle from_cpp(const Struct& from, rv_policy policy, cleanup_list* cleanup) noexcept {
    return make_caster<Tuple>::from_cpp(std::tie(from.*kFields...), policy, cleanup);
  }
};

namespace dw = doubleweave::scheduling;

template <>
struct type_caster<dw::Chunk> : fields_caster<dw::Chunk, &dw::Chunk::start, &dw::Chunk::num_tokens,
                                              &dw::Chunk::compiled_size> {};
template <>
struct type_caster<dw::Choice>
    : fields_caster<dw::Choice, &dw::Choice::schedule, &dw::Choice::workers, &dw::Choice::threads,
                    &dw::Choice::chunk, &dw::Choice::in_flight, &dw::Choice::abreast> {};
template <>
struct type_caster<dw::Decision>
    : fields_caster<dw::Decision, &dw::Decision::tokens, &dw::Decision::choice> {};
template <>
struct type_caster<dw::CallCosts>
    : fields_caster<dw::CallCosts, &dw::CallCosts::segment, &dw::CallCosts::device,
                    &dw::CallCosts::is_static, &dw::CallCosts::last_row> {};
template <>
struct type_caster<dw::ContentionTable>
    : fields_caster<dw::ContentionTable, &dw::ContentionTable::workers,
                    &dw::ContentionTable::shares> {};

}  // namespace nanobind::detail

namespace doubleweave::python {

inline scheduling::Wish to_wish(const std::string& schedule,
                                const std::optional<std::vector<std::string>>& workers,
                                std::optional<int> chunk, int threads) {
  return {schedule, workers.value_or(std::vector<std::string>{}), chunk, threads};
}

}  // namespace doubleweave::python
