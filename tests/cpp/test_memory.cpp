// Checks the memory of a session: the KV cache, the buffers between methods, and copies of blocks.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "doubleweave/buffers.h"
#include "doubleweave/kv_cache.h"
#include "src/padded_copy.h"

namespace dw = doubleweave;

namespace {

const auto kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

// Bytes of memory behind a range that begins at a page.
size_t resident_bytes(void* begin, size_t bytes) {
  std::vector<unsigned char> pages((bytes + kPage - 1) / kPage);
  if (mincore(begin, bytes, pages.data()) != 0) return 0;
  return kPage * static_cast<size_t>(std::count_if(pages.begin(), pages.end(),
                                                   [](unsigned char page) { return page & 1; }));
}

std::byte* bytes_of(void* data) { return static_cast<std::byte*>(data); }

bool all_are(const std::byte* bytes, size_t count, int value) {
  return std::all_of(bytes, bytes + count, [&](std::byte b) { return b == std::byte(value); });
}

void test_a_cache_is_reserved_and_committed_by_the_page() {
  const size_t num_tokens = size_t{1} << 20;
  dw::KvCache cache({kPage, kPage / 2}, static_cast<int64_t>(num_tokens), 8);
  CHECK(cache.num_entries() == 2 && cache.row_bytes(1) == kPage / 2, "entries");
  CHECK(cache.capacity_bytes(0) == (num_tokens + 8) * kPage, "with the slack");
  CHECK(cache.length() == 0 && cache.committed_bytes() == 0 && cache.peak_bytes() == 0, "empty");
  CHECK(resident_bytes(cache.data(0), 16 * kPage) == 0, "no page before it is written");
  std::memset(cache.data(0), 1, 3 * kPage);
  std::memset(cache.data(1), 1, 3 * kPage / 2);
  cache.note_length(3);
  CHECK(cache.length() == 3, "found %lld", static_cast<long long>(cache.length()));
  // One and a half pages are two.
  CHECK(cache.committed_bytes() == 5 * kPage, "found %zu", cache.committed_bytes());
  CHECK(resident_bytes(cache.data(0), 16 * kPage) == 3 * kPage, "the pages that were written");
  CHECK(resident_bytes(cache.data(1), 16 * kPage) == 2 * kPage, "the pages that were written");
  cache.note_length(3, 4);
  CHECK(cache.length() == 3 && cache.committed_bytes() == 11 * kPage, "padding takes memory");
  CHECK(cache.peak_bytes() == 11 * kPage, "found %zu", cache.peak_bytes());
}

void test_truncating_gives_memory_back() {
  dw::KvCache cache({kPage, kPage / 2}, 64);
  std::memset(cache.data(0), 7, 10 * kPage);
  std::memset(cache.data(1), 7, 5 * kPage);
  cache.note_length(10);
  cache.truncate(3);
  CHECK(cache.length() == 3 && cache.committed_bytes() == 5 * kPage, "whole pages past the third");
  CHECK(cache.peak_bytes() == 15 * kPage, "the peak stays");
  CHECK(resident_bytes(cache.data(0), 64 * kPage) == 3 * kPage, "given back");
  CHECK(resident_bytes(cache.data(1), 32 * kPage) == 2 * kPage, "given back");
  CHECK(all_are(bytes_of(cache.data(0)), 3 * kPage, 7), "what is kept");
  CHECK(all_are(bytes_of(cache.data(0)) + 3 * kPage, 7 * kPage, 0), "what is not reads as zeros");
  cache.truncate(0);
  CHECK(cache.committed_bytes() == 0 && resident_bytes(cache.data(0), 64 * kPage) == 0, "empty");
  cache.note_length(64);
  CHECK(cache.peak_bytes() == 96 * kPage, "found %zu", cache.peak_bytes());
}

void test_a_ring_keeps_what_a_window_shows() {
  // Four rows a page: a window of 10 rows and chunks of 5 take 16 rows.
  const size_t row = kPage / 4;
  dw::KvCache cache({row, row}, 1000, 5, {10, 0});
  CHECK(cache.capacity_bytes(0) == 1005 * row, "as many addresses as without a window");
  std::byte* const data = bytes_of(cache.data(0));
  const auto write = [&](int64_t begin, int64_t end) {
    cache.prepare(end);
    for (int64_t i = begin; i < end; ++i) {
      std::memset(data + i * row, static_cast<int>(i % 251), row);
      std::memset(bytes_of(cache.data(1)) + i * row, static_cast<int>(i % 251), row);
    }
  };
  for (int64_t end = 5; end <= 200; end += 5) {
    write(end - 5, end);
    cache.note_length(end);
    for (int64_t i = std::max<int64_t>(0, end - 15); i < end; ++i) {
      CHECK(all_are(data + i * row, row, static_cast<int>(i % 251)), "row %d", static_cast<int>(i));
    }
  }
  CHECK(cache.committed_bytes() == (16 + 200) * row, "found %zu", cache.committed_bytes());
  // Row 184 is the oldest, and a token behind 193 others sees it.
  CHECK(cache.least_length() == 193, "found %d", static_cast<int>(cache.least_length()));
  CHECK_REFUSED(cache.truncate(192), "cannot be truncated to 192");
  cache.truncate(195);
  write(195, 198);
  CHECK(all_are(data + 184 * row, row, 184) && all_are(data + 197 * row, row, 197), "both ends");
  cache.note_length(198);
  // A run that fails has written, and cannot be taken back.
  cache.prepare(230);
  CHECK_REFUSED(cache.prepare(203), "reset the session");
  cache.truncate(0);
  CHECK(cache.committed_bytes() == 0 && cache.least_length() == 0, "empty");
  write(0, 5);
  CHECK(all_are(data + 4 * row, row, 4) && all_are(data + 5 * row, 11 * row, 0), "as new");
  CHECK_REFUSED(cache.prepare(1006), "has 1005 rows, but 1006");
  CHECK_REFUSED(dw::KvCache({8}, 10, 2, {1, 2}), "1 entries was given 2 windows");
  const dw::KvCache short_context({row}, 16, 5, {10});
  CHECK(short_context.least_length() == 0, "no shorter than the context: every row has a place");
}

void test_a_caches_refusals() {
  CHECK_REFUSED(dw::KvCache({8}, 0), "room for at least one token");
  dw::KvCache counting({}, 3);
  counting.note_length(3);
  CHECK(counting.length() == 3, "%lld", static_cast<long long>(counting.length()));
  CHECK(counting.committed_bytes() == 0, "%zu", counting.committed_bytes());
  CHECK_REFUSED(counting.note_length(4), "4");
  CHECK_REFUSED(dw::KvCache({8}, 1, -1), "-1 of slack");
  CHECK_REFUSED(dw::KvCache({8, 0}, 1), "of 0 bytes cannot be reserved: the size is out of range");
  CHECK_REFUSED(dw::KvCache({1 << 20}, std::numeric_limits<int64_t>::max()),
                "ask for fewer tokens");
  CHECK_REFUSED(dw::KvCache({size_t{1} << 40}, 1 << 20), "ask for fewer tokens");
  dw::KvCache cache({8}, 10, 2);
  CHECK_REFUSED(cache.data(1), "has 1 entries, but entry 1 was named");
  CHECK_REFUSED(cache.note_length(11), "holds up to 10 tokens, but 11 were noted");
  CHECK_REFUSED(cache.note_length(-1), "holds up to 10 tokens, but -1 were noted");
  CHECK_REFUSED(cache.note_length(10, 3), "has 2 rows of slack, but 3 rows of padding");
  cache.note_length(4);
  CHECK_REFUSED(cache.truncate(5), "holds 4 tokens and cannot be truncated to 5");
  CHECK_REFUSED(cache.truncate(-1), "cannot be truncated to -1");
  CHECK(cache.length() == 4, "a refusal changes nothing");
}

void test_buffers() {
  const std::vector<size_t> sizes{1, 0, 64, 1000, 3 * kPage};
  const dw::Buffers buffers(sizes);
  CHECK(buffers.num_buffers() == sizes.size(), "found %zu", buffers.num_buffers());
  for (size_t i = 0; i < sizes.size(); ++i) {
    CHECK(buffers.bytes(i) == sizes[i], "buffer %zu: found %zu", i, buffers.bytes(i));
    CHECK(reinterpret_cast<uintptr_t>(buffers.data(i)) % 64 == 0, "buffer %zu is aligned", i);
    CHECK(all_are(bytes_of(buffers.data(i)), sizes[i], 0), "buffer %zu is zeroed", i);
  }
  for (size_t i = 0; i + 1 < sizes.size(); ++i) {
    const auto room = bytes_of(buffers.data(i + 1)) - bytes_of(buffers.data(i));
    CHECK(room >= static_cast<std::ptrdiff_t>(sizes[i] + 64), "kernels read past buffer %zu", i);
  }
  // Sizes with 64 bytes each, rounded up to 64.
  CHECK(buffers.total_bytes() == 128 + 64 + 128 + 1088 + 3 * kPage + 64, "found %zu",
        buffers.total_bytes());
  const dw::Buffers none(std::vector<size_t>{});
  CHECK(none.num_buffers() == 0 && none.total_bytes() == 0, "none");
  const dw::Buffers unwritten({1024 * kPage});
  CHECK(resident_bytes(unwritten.data(0), 1024 * kPage) == 0, "no page before it is written");
  CHECK_REFUSED(buffers.data(5), "there are 5 buffers, but buffer 5 was named");
  CHECK_REFUSED(buffers.bytes(5), "there are 5 buffers, but buffer 5 was named");
  CHECK_REFUSED(dw::Buffers({std::numeric_limits<size_t>::max()}), "buffers of more than");
  CHECK_REFUSED(dw::Buffers({size_t{1} << 46, size_t{1} << 46, 1}), "buffers of more than");
}

std::vector<std::byte> numbered(size_t count) {
  std::vector<std::byte> bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = std::byte(i + 1);
  return bytes;
}

void test_blocks_are_copied_with_padding() {
  std::vector<std::byte> source = numbered(24);
  std::vector<std::byte> target(32, std::byte{0xEE});
  const dw::BlockCopy copy{.source = 0,
                           .source_offset = 1,
                           .source_stride = 8,
                           .target = 1,
                           .target_offset = 2,
                           .target_stride = 10,
                           .num_blocks = 3,
                           .block_bytes = 4,
                           .pad_bytes = 2};
  const std::vector<dw::Region> regions{{source.data(), source.size()},
                                        {target.data(), target.size()}};
  dw::check_copy(copy, regions, "a copy");
  dw::copy_blocks(copy, {source.data(), target.data()});
  for (size_t at = 0; at < target.size(); ++at) {
    const size_t block = at < 2 ? 3 : (at - 2) / 10;
    const size_t within = at < 2 ? 0 : (at - 2) % 10;
    int expected = 0xEE;  // left as it was
    if (block < 3 && within < 4) expected = static_cast<int>(1 + 8 * block + within) + 1;
    if (block < 3 && within >= 4 && within < 6) expected = 0;
    CHECK(target[at] == std::byte(expected), "byte %zu: found %d, expected %d", at,
          static_cast<int>(target[at]), expected);
  }
}

void test_copies_that_are_refused() {
  std::vector<std::byte> memory(64);
  const std::vector<dw::Region> regions{
      {memory.data(), 32}, {memory.data() + 32, 32}, {nullptr, 32}};
  dw::BlockCopy good{};
  good.target = 1;
  good.source_stride = good.target_stride = 8;
  good.num_blocks = 4;
  good.block_bytes = 8;
  const auto refused = [&](auto change) {
    dw::BlockCopy copy = good;
    change(copy);
    return check::refusal([&] { dw::check_copy(copy, regions, "a copy"); });
  };
  const auto check_refused = [&](auto change, const std::string& part) {
    const std::string found = refused(change);
    CHECK(found.find(part) != std::string::npos, "found: %s", found.c_str());
  };
  using Copy = dw::BlockCopy;
  check_refused([](Copy&) {}, "(nothing was refused)");
  check_refused([](Copy& c) { c.num_blocks = 0; }, "(nothing was refused)");
  check_refused([](Copy& c) { c.source_offset = -1; }, "negative offset, stride or count: -1");
  check_refused([](Copy& c) { c.source = 3; }, "a copy reads region 3 of 3");
  check_refused([](Copy& c) { c.target = -1; }, "a copy writes region -1 of 3");
  check_refused([](Copy& c) { c.target = 2; }, "do not fit region 2 of 0 bytes");
  check_refused([](Copy& c) { c.num_blocks = 5; }, "do not fit region 0 of 32 bytes");
  check_refused([](Copy& c) { c.source_offset = 1; }, "do not fit region 0 of 32 bytes");
  check_refused([](Copy& c) { c.num_blocks = std::numeric_limits<int64_t>::max(); }, "do not fit");
  check_refused([](Copy& c) { c.block_bytes = std::numeric_limits<int64_t>::max(); }, "do not fit");
  check_refused([](Copy& c) { c.pad_bytes = 1; }, "do not fit region 1");
  check_refused([](Copy& c) { c.target_stride = 4; }, "overlap; set target_stride to at least 8");
  check_refused([](Copy& c) { c.target = 0; }, "copy by way of another region");
}

}  // namespace

int main() {
  test_a_cache_is_reserved_and_committed_by_the_page();
  test_truncating_gives_memory_back();
  test_a_ring_keeps_what_a_window_shows();
  test_a_caches_refusals();
  test_buffers();
  test_blocks_are_copied_with_padding();
  test_copies_that_are_refused();
  return check::finish();
}
