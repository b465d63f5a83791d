#include "fedlean/pattern.h"

#include <algorithm>

namespace fedlean {

std::size_t count_kept(const std::uint8_t* kept, std::size_t n) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) count += kept[i];
  return count;
}

std::vector<Chunk> cut_chunks(int channels, int channel_pixels, int chunk_channels, int outputs,
                              int groups) {
  const int group_in = channels / groups, group_out = outputs / groups;
  std::vector<Chunk> chunks;
  std::uint32_t rows = 0;
  for (int c = 0; c < channels; c += chunk_channels) {
    const int last = std::min(c + chunk_channels, channels) - 1;
    Chunk chunk;
    chunk.in_pixel = std::uint32_t(c) * channel_pixels;
    chunk.out_begin = c / group_in * group_out;
    chunk.out_end = (last / group_in + 1) * group_out;
    chunk.first_row = rows;
    rows += chunk.out_end - chunk.out_begin;
    chunks.push_back(chunk);
  }
  return chunks;
}

GatherPattern build_gather(std::vector<Chunk> chunks, std::uint32_t chunk_pixels, int outputs,
                           const std::vector<Tap>& taps, std::vector<std::uint32_t>& position) {
  GatherPattern pattern;
  const std::size_t rows = rows_of(chunks);
  pattern.row_start.assign(rows + 1, 0);
  pattern.row_first.resize(rows);
  std::vector<bool> seen(outputs, false);
  for (const Chunk& chunk : chunks) {
    for (std::uint32_t o = chunk.out_begin; o < chunk.out_end; ++o) {
      pattern.row_first[chunk.first_row + (o - chunk.out_begin)] = !seen[o];
      seen[o] = true;
    }
  }
  auto row_of = [&](const Tap& tap) {
    const Chunk& chunk = chunks[tap.in_pixel / chunk_pixels];
    return chunk.first_row + (tap.out - chunk.out_begin);
  };
  for (const Tap& tap : taps) ++pattern.row_start[row_of(tap) + 1];
  for (std::size_t r = 0; r < rows; ++r) pattern.row_start[r + 1] += pattern.row_start[r];
  std::vector<std::uint32_t> next(pattern.row_start.begin(), pattern.row_start.end() - 1);
  pattern.offset.resize(taps.size());
  position.resize(taps.size());
  for (std::size_t i = 0; i < taps.size(); ++i) {
    position[i] = next[row_of(taps[i])]++;
    pattern.offset[position[i]] = std::uint16_t(taps[i].in_pixel % chunk_pixels);
  }
  pattern.chunks = std::move(chunks);
  return pattern;
}

ColumnPattern build_columns(const std::uint8_t* kept, int rows, int columns, std::size_t row_step,
                            std::size_t column_step, int block_rows) {
  ColumnPattern pattern;
  pattern.columns = columns;
  pattern.rows = rows;
  pattern.block_rows = block_rows;
  const std::size_t cells = std::size_t(pattern.blocks()) * columns;
  pattern.start.assign(cells + 1, 0);
  // f(cell, row) for every kept entry, in the order in which the array lies in memory.
  auto visit = [&](auto&& f) {
    const bool by_row = column_step == 1;
    const int outer = by_row ? rows : columns, inner = by_row ? columns : rows;
    for (int i = 0; i < outer; ++i) {
      const std::uint8_t* const line = kept + i * (by_row ? row_step : column_step);
      if (by_row) {
        const std::size_t cells_before = std::size_t(i / block_rows) * columns;
        for_kept(line, inner, [&](std::size_t j) { f(cells_before + j, i % block_rows); });
      } else {
        for_kept(line, inner,
                 [&](std::size_t j) { f(j / block_rows * columns + i, int(j % block_rows)); });
      }
    }
  };
  visit([&](std::size_t cell, int) { ++pattern.start[cell + 1]; });
  for (std::size_t i = 0; i < cells; ++i) pattern.start[i + 1] += pattern.start[i];
  pattern.row.resize(pattern.start[cells]);
  std::vector<std::uint32_t> next(pattern.start.begin(), pattern.start.end() - 1);
  visit([&](std::size_t cell, int row) { pattern.row[next[cell]++] = std::uint16_t(row); });
  return pattern;
}

}  // namespace fedlean
