// Losses on logits [class][lane] per panel, as PyTorch defines them.
#pragma once

#include <cstdint>

#include "fedlean/layer.h"

namespace fedlean {

enum class Loss { kCrossEntropy, kBinaryCrossEntropy };

// The mean over the batch; writes dLoss/dlogits to `grad` unless it is null (idle lanes: 0).
// Cross-entropy, or BCE-with-logits on one-hot labels with the mean over examples and classes.
double evaluate_loss(Loss loss, const View& logits, const std::int64_t* labels, Batch batch,
                     const View& grad);

}  // namespace fedlean
