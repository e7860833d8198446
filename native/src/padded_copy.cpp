#include "padded_copy.h"

#include <cstdint>
#include <cstring>

#include "doubleweave/error.h"

namespace doubleweave {
namespace {

// Throws unless the blocks that one side of a copy "reads" or "writes" lie inside its region.
// Differences are compared, not sums, so that nothing overflows whatever the numbers.
void check_side(const char* verb, int32_t place, int64_t offset, int64_t stride,
                const BlockCopy& copy, int64_t pad_bytes, const std::vector<Region>& regions,
                const std::string& name) {
  require(place >= 0 && place < static_cast<int32_t>(regions.size()), name, " ", verb, " region ",
          place, " of ", regions.size(), ".");
  const auto [start, bytes] = regions[place];
  const int64_t available = start == nullptr ? 0 : static_cast<int64_t>(bytes);
  int64_t spare = available - offset;
  bool fits = spare >= 0;
  if (fits && copy.num_blocks > 0) {
    fits = start != nullptr && copy.block_bytes <= spare && pad_bytes <= spare - copy.block_bytes;
    spare -= fits ? copy.block_bytes + pad_bytes : 0;
    fits = fits && (stride == 0 || copy.num_blocks - 1 <= spare / stride);
  }
  require(fits, name, " ", verb, " ", copy.num_blocks, " blocks of ", copy.block_bytes, " + ",
          pad_bytes, " bytes at offset ", offset, ", ", stride, " apart, which do not fit region ",
          place, " of ", available, " bytes.");
}

}  // namespace

void check_copy(const BlockCopy& copy, const std::vector<Region>& regions,
                const std::string& name) {
  for (const int64_t number :
       {copy.source_offset, copy.source_stride, copy.target_offset, copy.target_stride,
        copy.num_blocks, copy.block_bytes, copy.pad_bytes}) {
    require(number >= 0, name, " has a negative offset, stride or count: ", number,
            "; give zero or more.");
  }
  check_side("reads", copy.source, copy.source_offset, copy.source_stride, copy, 0, regions, name);
  check_side("writes", copy.target, copy.target_offset, copy.target_stride, copy, copy.pad_bytes,
             regions, name);
  if (copy.num_blocks == 0) {
    return;
  }
  const int64_t written_bytes = copy.block_bytes + copy.pad_bytes;
  require(copy.num_blocks == 1 || copy.target_stride >= written_bytes, name, " writes blocks of ",
          copy.block_bytes, " + ", copy.pad_bytes, " bytes ", copy.target_stride,
          " apart, which overlap; set target_stride to at least ", written_bytes, ".");
  const int64_t last = copy.num_blocks - 1;
  const int64_t source_end = copy.source_offset + last * copy.source_stride + copy.block_bytes;
  const int64_t target_end = copy.target_offset + last * copy.target_stride + written_bytes;
  require(copy.source != copy.target || copy.block_bytes == 0 || copy.source_offset >= target_end ||
              copy.target_offset >= source_end,
          name, " reads bytes ", copy.source_offset, " to ", source_end, " and writes bytes ",
          copy.target_offset, " to ", target_end, " of region ", copy.source,
          ", which overlap; copy by way of another region.");
}

void copy_blocks(const BlockCopy& copy, const std::vector<std::byte*>& starts) {
  const std::byte* const source = starts[copy.source] + copy.source_offset;
  std::byte* const target = starts[copy.target] + copy.target_offset;
  for (int64_t i = 0; i < copy.num_blocks; ++i) {
    std::byte* const block = target + i * copy.target_stride;
    // memmove, for two regions may be rebound to the same memory.
    std::memmove(block, source + i * copy.source_stride, static_cast<size_t>(copy.block_bytes));
    if (copy.pad_bytes > 0) {
      std::memset(block + copy.block_bytes, 0, static_cast<size_t>(copy.pad_bytes));
    }
  }
}

}  // namespace doubleweave
