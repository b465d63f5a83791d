#include "fedlean/pattern.h"

#include <algorithm>

namespace fedlean {

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

ColumnPattern build_columns(const std::uint8_t* kept, int outputs, int inputs, int block_rows) {
  ColumnPattern pattern;
  pattern.inputs = inputs;
  pattern.outputs = outputs;
  pattern.block_rows = block_rows;
  const std::size_t cells = std::size_t(pattern.blocks()) * inputs;
  pattern.start.assign(cells + 1, 0);
  for (int o = 0; o < outputs; ++o) {
    std::uint32_t* const count = pattern.start.data() + 1 + std::size_t(o / block_rows) * inputs;
    const std::uint8_t* const row = kept + std::size_t(o) * inputs;
    for (int i = 0; i < inputs; ++i) count[i] += row[i] != 0;
  }
  for (std::size_t i = 0; i < cells; ++i) pattern.start[i + 1] += pattern.start[i];
  pattern.row.resize(pattern.start[cells]);
  std::vector<std::uint32_t> next(pattern.start.begin(), pattern.start.end() - 1);
  for (int o = 0; o < outputs; ++o) {
    std::uint32_t* const at = next.data() + std::size_t(o / block_rows) * inputs;
    const std::uint8_t* const row = kept + std::size_t(o) * inputs;
    for (int i = 0; i < inputs; ++i)
      if (row[i]) pattern.row[at[i]++] = std::uint16_t(o % block_rows);
  }
  return pattern;
}

}  // namespace fedlean
