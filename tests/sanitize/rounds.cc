#include "rounds.h"

#include <cstring>

#include "draw.h"
#include "token.h"

namespace sanitize {
namespace {

using namespace moe_a2a;
using cpu::Status;

Arrived arrivals_at(const Setup& s, const Round& round, int to) {
  Arrived here(s.ranks);
  for (int64_t source = 0; source < s.ranks; ++source) {
    if ((round.active >> source & 1) == 0) continue;
    for (int64_t t = 0; t < round.tokens[source]; ++t)
      if ((choices_of(s, round, source, t).ranks >> to & 1) != 0) here[source].push_back(t);
  }
  return here;
}

void same(const Rank& rank, const uint8_t* found, const Bytes& wanted, const char* what) {
  if (!wanted.empty() && std::memcmp(found, wanted.data(), wanted.size()) != 0)
    die(rank, std::string(what) + " are not what was sent");
}

void check_row(const Rank& rank, const Round& round, int64_t source, int64_t t, int64_t at) {
  const Setup& s = rank.setup;
  const auto found = [&](int region, int64_t width) {
    return rank.endpoint.region(rank.endpoint.rank, region) + at * width;
  };
  const Choices choices = choices_of(s, round, source, t);
  same(rank, found(kIds, s.top_k * 4), choices.delivered_ids, "ids");
  same(rank, found(kWeights, s.top_k * 4), choices.delivered_weights, "weights");
  for (size_t i = 0; i < s.extras.size(); ++i)
    same(rank, found(kExtra + static_cast<int>(i), s.extras[i]), extra_of(s, round, source, t, i),
         "extras");
  if (round.input != Input::kAnyBits) {
    const Content content = content_of(s, round, source, t);
    same(rank, found(kPayload, content.wire.payload.size()), content.wire.payload, "rows");
    same(rank, found(kScales, content.wire.scales.size()), content.wire.scales, "scales");
  }
  count(tally.rows);
}

void check_padding(const Rank& rank, const Round& round, int64_t at) {
  const Setup& s = rank.setup;
  const bool deferred = round.input == Input::kDefer;
  const Widths widths = s.widths();
  const auto found = [&](int region, int64_t width) {
    return rank.endpoint.region(rank.endpoint.rank, region) + at * width;
  };
  Bytes invalid(s.top_k * 4);
  for (int64_t k = 0; k < s.top_k; ++k) std::memcpy(&invalid[k * 4], &s.invalid_id, 4);
  same(rank, found(kIds, s.top_k * 4), invalid, "ids of padding");
  same(rank, found(kWeights, s.top_k * 4), Bytes(s.top_k * 4), "weights of padding");
  if (!s.scrub_all) return;
  const int64_t payload = deferred ? 2 * s.hidden : widths.payload;
  const int64_t scales = deferred ? 0 : widths.scales;
  same(rank, found(kPayload, payload), Bytes(payload), "rows of padding");
  same(rank, found(kScales, scales), Bytes(scales), "scales of padding");
}

void check_received(const Rank& rank, const Round& round, const int32_t* counts) {
  const Arrived here = arrivals_at(rank.setup, round, rank.endpoint.rank);
  for (int64_t source = 0; source < rank.setup.ranks; ++source) {
    const auto& tokens = here[source];
    require(rank, counts[source] == static_cast<int32_t>(tokens.size()), "a wrong count");
    for (int64_t i = 0; i < round.rows; ++i) {
      const int64_t at = source * round.rows + i;
      if (i < counts[source])
        check_row(rank, round, source, tokens[i], at);
      else
        check_padding(rank, round, at);
    }
  }
}

// What the experts of `from` make of a token, for a wire and a scalar.
std::vector<double> answer(const Setup& s, const Round& round, int64_t from, int64_t source,
                           int64_t t) {
  const auto seed = static_cast<int64_t>(draw({round.seed, from, source, t, 11}));
  if (!quantized(s.combine_wire)) return plain_values(s.hidden, seed);
  return known_row(s.combine_wire, widths_of(s.combine_wire, s.hidden, 32), s.hidden, 1, seed)
      .values;
}

void check_sums(const Rank& rank, const Round& round, const Matrix& out) {
  const Setup& s = rank.setup;
  for (int64_t t = 0; t < round.tokens[rank.endpoint.rank]; ++t) {
    std::vector<double> sum(s.hidden);
    cpu::for_each_rank(choices_of(s, round, rank.endpoint.rank, t).ranks, [&](int from) {
      const auto row = answer(s, round, from, rank.endpoint.rank, t);
      for (int64_t i = 0; i < s.hidden; ++i) sum[i] += row[i];
    });
    same(rank, out.row(t), rounded(sum, round.combine_scalar), "sums");
    count(tally.sums);
  }
}

// The rows of all sources in one allocation, `rows` apart; of those that are no answer, all ones.
struct Answers {
  Matrix matrix;
  int64_t source_stride, row_stride;
};

Answers answers_of(const Rank& rank, const Round& round) {
  const Setup& s = rank.setup;
  const int64_t item = bytes_of(round.combine_scalar), width = s.hidden * item;
  Matrix y(s.ranks * round.rows, width, item, round.strided);
  // An empty tensor of torch has strides as if it held one row.
  const int64_t stride = y.rows().stride;
  const int64_t source_stride = round.rows == 0 ? width : round.rows * stride;
  const Arrived here = arrivals_at(s, round, rank.endpoint.rank);
  for (int64_t source = 0; source < s.ranks; ++source)
    for (int64_t i = 0; i < round.rows; ++i) {
      uint8_t* row = y.row(source * round.rows + i);
      std::memset(row, 0xFF, width);
      if (i >= static_cast<int64_t>(here[source].size())) continue;
      const auto values = answer(s, round, rank.endpoint.rank, source, here[source][i]);
      std::memcpy(row, exactly(values, round.combine_scalar).data(), width);
    }
  return {std::move(y), source_stride, stride};
}

struct Inputs {
  Matrix x, scales, ids, weights;
  std::vector<Matrix> extras;
};

void copy_in(const Matrix& matrix, int64_t t, const Bytes& bytes) {
  if (!bytes.empty()) std::memcpy(matrix.row(t), bytes.data(), bytes.size());
}

Inputs inputs_of(const Rank& rank, const Round& round) {
  const Setup& s = rank.setup;
  const int64_t source = rank.endpoint.rank, tokens = round.tokens[source];
  const Widths widths = s.widths();
  const bool quantizes = round.input == Input::kQuantize || round.input == Input::kAnyBits;
  const bool moved_scales = round.input == Input::kMove && widths.scales != 0;
  const int64_t item = quantizes ? bytes_of(round.scalar) : quantized(s.wire) ? 1 : 2;
  const int64_t width = quantizes                      ? s.hidden * item
                        : round.input == Input::kDefer ? s.hidden * 2
                                                       : widths.payload;
  Inputs in{
      Matrix(tokens, width, item, round.strided),
      Matrix(moved_scales ? tokens : 0, widths.scales, 1, round.strided),
      Matrix(tokens, s.top_k * (round.wide_ids ? 8 : 4), round.wide_ids ? 8 : 4, round.strided),
      Matrix(tokens, s.top_k * 4, 4, round.strided),
      {}};
  for (int64_t nbytes : s.extras) in.extras.emplace_back(tokens, nbytes, 1, round.strided);
  for (int64_t t = 0; t < tokens; ++t) {
    const Choices choices = choices_of(s, round, source, t);
    const Content content = content_of(s, round, source, t);
    copy_in(in.x, t, content.x);
    if (moved_scales) copy_in(in.scales, t, content.wire.scales);
    copy_in(in.ids, t, choices.given_ids);
    copy_in(in.weights, t, choices.given_weights);
    for (size_t i = 0; i < s.extras.size(); ++i)
      copy_in(in.extras[i], t, extra_of(s, round, source, t, i));
  }
  return in;
}

}  // namespace

Matrix::Matrix(int64_t rows, int64_t width, int64_t item, bool strided)
    : stride_(strided ? width + 3 * item : width), data_(nullptr) {
  if (rows == 0) return;
  const int64_t offset = strided ? item : 0;
  memory_.reset(new uint8_t[offset + (rows - 1) * stride_ + width]);
  data_ = memory_.get() + offset;
}

Status dispatch_round(Rank& rank, const Round& round) {
  Endpoint& e = rank.endpoint;
  const Inputs in = inputs_of(rank, round);
  const std::unique_ptr<int32_t[]> counts(new int32_t[rank.setup.ranks]);
  const bool quantizes = round.input == Input::kQuantize || round.input == Input::kAnyBits;
  DispatchArgs a{};
  a.tokens = round.tokens[e.rank];
  a.max_rows = round.rows;
  a.payload = in.x.rows();
  a.scales = in.scales.rows();
  a.ids = in.ids.rows();
  a.weights = in.weights.rows();
  for (size_t i = 0; i < in.extras.size(); ++i) a.extra[i] = in.extras[i].rows();
  a.counts = counts.get();
  a.wire = rank.setup.wire;
  a.input = quantizes ? round.scalar : -1;
  a.wide_ids = round.wide_ids;
  a.deferred = round.input == Input::kDefer;
  a.global_scale = static_cast<float>(round.global_scale);
  a.active = round.active;
  Status status = cpu::dispatch(e, a, round.slice_ns);
  while (status == cpu::kPending) status = cpu::finish_dispatch(e, round.slice_ns);
  if (status == cpu::kDone) check_received(rank, round, counts.get());
  return status;
}

Status combine_round(Rank& rank, const Round& round) {
  Endpoint& e = rank.endpoint;
  const Answers y = answers_of(rank, round);
  const int64_t item = bytes_of(round.combine_scalar);
  const Matrix out(round.tokens[e.rank], rank.setup.hidden * item, item, round.strided);
  CombineArgs a{};
  a.y = y.matrix.rows().data;
  a.source_stride = y.source_stride;
  a.row_stride = y.row_stride;
  a.out = const_cast<uint8_t*>(out.rows().data);
  a.out_stride = out.rows().stride;
  a.scalar = round.combine_scalar;
  Status status = cpu::combine(e, a, round.slice_ns);
  while (status == cpu::kPending) status = cpu::finish_combine(e, round.slice_ns);
  if (status == cpu::kDone) check_sums(rank, round, out);
  return status;
}

void play_round(Rank& rank, const Round& round) {
  require(rank, dispatch_round(rank, round) == cpu::kDone, "dispatch failed");
  require(rank, combine_round(rank, round) == cpu::kDone, "combine failed");
  count(tally.rounds);
}

}  // namespace sanitize
