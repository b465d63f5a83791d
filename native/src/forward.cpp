#include "fedlean/forward.h"

#include <algorithm>
#include <atomic>

namespace fedlean {

namespace {

// The memory that more than one panel at a time may cost, as a share of that with one.  The weights
// of a direction are made anew for every group of panels: that is little work beside a
// convolution's, and as much as the layer's own in a small Linear.
constexpr std::size_t kMostTimes2 = 3;  // half as much again

}  // namespace

ForwardSession::ForwardSession(std::shared_ptr<Engine> engine, const Network& network,
                               const ForwardOptions& options)
    : engine_(std::move(engine)),
      options_(options),
      at_once_(std::min(options.directions_at_once, engine_->pool.threads())),
      model_(network, options.tensors, false) {
  program_ = model_.program(mode(1));
  const std::size_t weights = model_.planned_bytes() / sizeof(float);
  const std::size_t most = (weights + program_->floats()) * kMostTimes2 / 2;
  for (int panels = Batch{options.batch_size}.panels(); panels > 1; panels /= 2) {
    std::unique_ptr<Program> wider = model_.program(mode(panels));
    if (weights + wider->floats() > most) continue;
    program_ = std::move(wider);
    break;
  }
}

Mode ForwardSession::mode(int group_panels) const {
  Mode m;
  m.moved = true;
  m.examples = options_.batch_size;
  m.group_panels = group_panels;
  m.threads = engine_->pool.threads();
  return m;
}

std::size_t ForwardSession::planned_bytes() const {
  return model_.planned_bytes() + program_->floats() * at_once_ * sizeof(float);
}

std::size_t ForwardSession::held_bytes() const {
  return model_.held_bytes() + arena_.floats() * sizeof(float);
}

double ForwardSession::loss(const float* x, const std::int64_t* y, int examples) {
  return loss_at(x, y, examples, nullptr, engine_->pool, arena());
}

void ForwardSession::losses(const float* x, const std::int64_t* y, int examples,
                            const std::vector<Direction>& directions, double* losses) {
  float* const memory = arena();
  const int count = int(directions.size());
  if (at_once_ == 1) {
    for (int i = 0; i < count; ++i)
      losses[i] = loss_at(x, y, examples, &directions[i], engine_->pool, memory);
    return;
  }
  std::atomic<int> next{0};
  engine_->pool.run([&](int thread) {
    if (thread >= at_once_) return;
    float* const own = memory + program_->floats() * thread;
    for (int i = next++; i < count; i = next++)
      losses[i] = loss_at(x, y, examples, &directions[i], alone_, own);
  });
}

double ForwardSession::loss_at(const float* x, const std::int64_t* y, int examples,
                               const Direction* direction, ThreadPool& pool, float* memory) const {
  const Batch batch{examples};
  program_->forward(engine_->kernels, pool, memory, x, batch, direction);
  return evaluate_loss(options_.loss, program_->value(memory, program_->output()), y, batch,
                       View{});
}

void ForwardSession::forward(const float* x, int examples, const std::vector<int>& nodes,
                             const std::vector<float*>& values) {
  Mode m = mode(1);
  m.moved = false;
  m.taps = nodes;
  m.examples = examples;
  const std::unique_ptr<Program> program = model_.program(m);
  const Batch batch{examples};
  float* const memory = arena_.ensure(program->floats());
  program->forward(engine_->kernels, engine_->pool, memory, x, batch);
  for (std::size_t i = 0; i < nodes.size(); ++i)
    for_values(program->value(memory, program->tensor_of(nodes[i])), batch,
               [&](float v, std::size_t at) { values[i][at] = v; });
  if (arena_.floats() > program_->floats() * at_once_) arena_.free();
}

}  // namespace fedlean
