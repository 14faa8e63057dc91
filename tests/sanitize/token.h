// What a token of a round is: where it goes, and what it carries.
#pragma once

#include "rounds.h"

namespace sanitize {

struct Choices {
  uint64_t ranks;                          // mask
  Bytes given_ids, given_weights;          // as the caller has them
  Bytes delivered_ids, delivered_weights;  // as every rank in the mask gets them
};

Choices choices_of(const Setup& setup, const Round& round, int64_t source, int64_t t);

struct Content {
  Bytes x;       // as the caller has it
  WireRow wire;  // as it arrives; of kAnyBits nobody knows
};

Content content_of(const Setup& setup, const Round& round, int64_t source, int64_t t);

Bytes extra_of(const Setup& setup, const Round& round, int64_t source, int64_t t, size_t index);

}  // namespace sanitize
