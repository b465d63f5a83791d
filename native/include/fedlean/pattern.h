// Where the kept weights of a layer are: the sparse formats that the kernels walk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fedlean/layout.h"

namespace fedlean {

// f(i) for every i < n with kept[i] = 1; the others are 0.  Eight at a time: masks are long and
// sparse, and a branch per coordinate costs more than the rest of building a pattern.
template <typename F>
void for_kept(const std::uint8_t* kept, std::size_t n, F&& f) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, kept + i, 8);
    for (; word; word &= word - 1) f(i + __builtin_ctzll(word) / 8);  // little-endian
  }
  for (; i < n; ++i)
    if (kept[i]) f(i);
}
std::size_t count_kept(const std::uint8_t* kept, std::size_t n);

// Every convolution runs as one of stride 1: a stride s first splits its padded input into s*s
// phases (space to depth), after which tap (ky, kx) reads phase (ky % s, kx % s) at the offset
// (ky / s, kx / s).  "Channel" below means such a phase channel.
//
// Non-zeros are ordered (chunk of input channels, output channel): the chunk's
// window stays in the cache while all output channels pass over it.
struct Chunk {
  std::uint32_t in_pixel;  // where the chunk's first input channel starts
  std::uint32_t out_begin, out_end;  // output channels that have non-zeros here
  std::uint32_t first_row;  // of out_begin, in row_start
};

struct GatherPattern {
  std::vector<Chunk> chunks;
  std::vector<std::uint32_t> row_start;  // per (chunk, output channel); one more at the end
  std::vector<std::uint8_t> row_first;  // 1 where an output channel comes for the first time
  std::vector<std::uint16_t> offset;  // pixels from the chunk's start, per non-zero
  std::size_t nonzeros() const { return offset.size(); }
  std::size_t bytes() const {
    return chunks.size() * sizeof(Chunk) + row_start.size() * sizeof(std::uint32_t) +
           offset.size() * sizeof(std::uint16_t) + row_first.size();
  }
};

// One kept weight while a pattern is being built: it moves input pixel `in_pixel` (of the whole
// input, tap offset included) to output channel `out`.
struct Tap {
  std::uint32_t out, in_pixel;
};

// Chunks of `chunk_pixels` (at most 65536) each, for an input of `channels` of `channel_pixels`.
// Outputs and inputs fall into `groups`; a chunk's outputs are those of the groups that it touches,
// so that every output is in some chunk.  How many rows there are does not depend on the taps.
std::vector<Chunk> cut_chunks(int channels, int channel_pixels, int chunk_channels, int outputs,
                              int groups);

inline std::size_t rows_of(const std::vector<Chunk>& chunks) {
  const Chunk& last = chunks.back();
  return last.first_row + (last.out_end - last.out_begin);
}
inline std::size_t gather_bytes(const std::vector<Chunk>& chunks, std::size_t nonzeros) {
  const std::size_t rows = rows_of(chunks);
  return chunks.size() * sizeof(Chunk) + (rows + 1) * sizeof(std::uint32_t) + rows +
         nonzeros * sizeof(std::uint16_t);
}

// Orders the taps by (chunk, output), otherwise as they come; position[i] is where tap i went.
GatherPattern build_gather(std::vector<Chunk> chunks, std::uint32_t chunk_pixels, int outputs,
                           const std::vector<Tap>& taps, std::vector<std::uint32_t>& position);

// A sparse Linear weight by columns, cut into blocks of rows so that one block's activations stay
// in the near caches.  Columns are the layer's inputs and rows its outputs, or the other way round
// where no gradient of the input is needed: nothing is scattered then.  Non-zeros are ordered
// (block, column, row).
struct ColumnPattern {
  int columns = 0, rows = 0, block_rows = 0;
  std::vector<std::uint32_t> start;  // per (block, column); one more at the end
  std::vector<std::uint16_t> row;  // within the block
  int blocks() const { return block_rows ? (rows + block_rows - 1) / block_rows : 0; }
  std::size_t nonzeros() const { return row.size(); }
  std::size_t bytes() const {
    return start.size() * sizeof(std::uint32_t) + row.size() * sizeof(std::uint16_t);
  }
};

// From an array of 0 and 1 whose entry (row, column) is at row*row_step + column*column_step.
// Requires block_rows <= 65536.
ColumnPattern build_columns(const std::uint8_t* kept, int rows, int columns, std::size_t row_step,
                            std::size_t column_step, int block_rows);

}  // namespace fedlean
