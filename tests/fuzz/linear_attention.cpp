// Linear attention on arguments of any kind: a sound call must give the right answer and write nothing else, any other
// must be refused and write nothing. Built with libFuzzer (CHELA_BUILD_FUZZERS).
#include "chela/cpu/attention/linear.hpp"
#include "fuzz/linear_attention_case.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct ValueMajor : LinearAttentionForm {
  static constexpr StateLayout state_layout = StateLayout::value_major;
};
constexpr ChunkPolicy short_tiles{.chunk_len = 3, .value_tile = 8};
constexpr ChunkPolicy chunked{.evaluation = Evaluation::chunked, .chunk_len = 5};

/// Whether a state is still what it was.
bool same_state(TensorView<float, 4> states, const Tensor<double, 4>& before, Index entry) {
  bool same = true;
  for_each_index(run(states, 0, entry, 1),
                 [&](Index, auto... i) { same = same && double(states(entry, i...)) == before(entry, i...); });
  return same;
}
bool same_states(TensorView<float, 4> states, const Tensor<double, 4>& before) {
  bool same = true;
  for (Index entry = 0; entry < states.extents[0]; ++entry) same = same && same_state(states, before, entry);
  return same;
}

template <ChunkPolicy P, DecayKind D, RuleKind R, class F>
void forward(Bytes& bytes) {
  LinearAttentionCase<D, R, F> c(bytes, false);
  const Span span = R == RuleKind::additive && bytes.once_in(4) ? Span::bidirectional : Span::causal;
  bool wrong_slots = false;
  const Index entries = c.draw_slots(wrong_slots);
  const bool in_place = bytes.upto(1), pooled = entries != c.sequences;
  auto o = c.output(c.extents(c.token_extents(c.shape.output_heads(), c.shape.value_dim)));
  Placed<float, 4> initial, separate;
  const auto states = [&] { return c.extents(c.state_extents(entries), pooled ? 1 : 0); };
  if (in_place) {
    initial = c.output(states());
    initial.fill([&] { return c.uniform(-1, 1); });
  } else {
    if (bytes.upto(1)) initial = c.input(states());
    if (bytes.upto(1)) separate = c.output(states());
  }
  const Placed<float, 4>& final_state = in_place ? initial : separate;
  if (wrong_slots && (initial.present() || final_state.present())) c.sound = false;

  Index every = P.chunk_len * (1 + bytes.upto(1)), longest = 0;
  if (c.sound)
    for (Index i = 0; i < c.sequences; ++i) longest = std::max(longest, c.sequence(i).count);
  Placed<float, 5> boundary, last;
  if (bytes.once_in(3)) {
    const bool short_of_room = longest >= every && bytes.once_in(10);
    boundary =
        c.output(c.extents(c.saved_extents(longest / every - short_of_room + bytes.upto(1) * !short_of_room), 2));
    if (short_of_room || span != Span::causal) c.sound = false;
    if (bytes.once_in(12)) every += bytes.upto(1) ? 1 : -every - bytes.upto(1), c.sound = false;
  }
  if (bytes.once_in(3)) {
    last = c.output(c.extents(c.saved_extents(bytes.upto(4)), 2));
    if (span != Span::causal) c.sound = false;
  }

  const Tensor<double, 4> before = converted<double>(key_major<F>(initial.view()));
  const bool ok = cpu::linear_attention<P>(LinearAttentionArgs<float, D, R, F>{.q = c.q,
                                                                               .k = c.k,
                                                                               .v = c.v,
                                                                               .o = o,
                                                                               .initial_state = initial,
                                                                               .final_state = final_state,
                                                                               .span = span,
                                                                               .log_decay = c.log_decay,
                                                                               .beta = c.beta,
                                                                               .cu_seqlens = c.offsets.view,
                                                                               .state_slots = c.slots.view,
                                                                               .boundary_states = boundary,
                                                                               .boundary_every = every,
                                                                               .last_states = last},
                                           c.executor)
                      .ok();
  demand(ok == c.sound, ok ? "an unsound call is accepted" : "a sound call is refused");
  if (!ok) {
    demand(o.untouched() && separate.untouched() && boundary.untouched() && last.untouched() &&
               same_states(key_major<F>(initial.view()), before),
           "a refused call writes");
    return;
  }
  demand(o.guards_intact() && initial.guards_intact() && separate.guards_intact() && boundary.guards_intact() &&
             last.guards_intact(),
         "memory between the elements is written");

  const auto saved = [](const Placed<float, 5>& x, Index i, Index n) {
    return run(slice_axis<1>(key_major<F>(x.view()), n), 0, i, 1);
  };
  std::vector<char> owned(std::size_t(entries), 0);
  for (Index i = 0; i < c.sequences; ++i) {
    const Index count = c.sequence(i).count;
    const auto want = c.answer(i, before, count, span);
    c.demand_close(c.tokens_of(o.view(), i), want.o, "o");
    if (final_state.present())
      c.demand_close(run(key_major<F>(final_state.view()), 0, c.entry(i), 1), want.state, "final_state");
    if (final_state.present()) owned[std::size_t(c.entry(i))] = 1;
    for (Index n = 0; boundary.present() && n < boundary.view().extents[1]; ++n)
      if (n < count / every)
        c.demand_close(saved(boundary, i, n), c.answer(i, before, (n + 1) * every, span).state, "boundary_states");
      else
        for_each_index(saved(boundary, i, n), [&, at = saved(boundary, i, n)](auto... x) {
          demand(at(x...) == boundary.guard(), "a boundary past the end is written");
        });
    for (Index n = 0; last.present() && n < last.view().extents[1]; ++n) {
      const Index until = std::max<Index>(count - (last.view().extents[1] - 1 - n), 0);
      c.demand_close(saved(last, i, n), c.answer(i, before, until, span).state, "last_states");
    }
  }
  for (Index e = 0; e < entries; ++e) {
    if (owned[std::size_t(e)]) continue;
    demand(!in_place || same_state(key_major<F>(initial.view()), before, e), "another's state is written");
    if (!separate.present()) continue;
    for_each_index(slice(separate.view(), e), [&, at = slice(separate.view(), e)](auto... x) {
      demand(at(x...) == separate.guard(), "another's final state is written");
    });
  }
}

template <DecayKind D, RuleKind R, class F>
void backward(Bytes& bytes) {
  using Case = LinearAttentionCase<D, R, F>;
  Case c(bytes, false);
  const Span span = R == RuleKind::additive && bytes.once_in(4) ? Span::bidirectional : Span::causal;
  auto grad_o = c.input(c.extents(c.token_extents(c.shape.output_heads(), c.shape.value_dim)));
  const auto maybe = [&](auto extents) {
    return bytes.once_in(4) ? Placed<float, int(extents.size())>() : c.output(c.extents(extents));
  };
  auto grad_q = maybe(c.token_extents(c.shape.query_heads, c.shape.key_dim));
  auto grad_k = maybe(c.token_extents(c.shape.key_heads, c.shape.key_dim));
  auto grad_v = maybe(c.token_extents(c.shape.value_heads, c.shape.value_dim));
  auto grad_initial = maybe(c.state_extents(c.sequences));
  Placed<float, log_decay_rank(D)> grad_decay;
  Placed<float, 3> grad_beta;
  if constexpr (D != DecayKind::none) grad_decay = maybe(c.decay_extents());
  if constexpr (R == RuleKind::delta) grad_beta = maybe(c.gate_extents());
  Placed<float, 4> initial, grad_final;
  if (bytes.upto(1)) initial = c.input(c.extents(c.state_extents(c.sequences)));
  if (bytes.upto(1)) grad_final = c.input(c.extents(c.state_extents(c.sequences)));
  const bool ok = cpu::linear_attention_backward<short_tiles>(
                      LinearAttentionBackwardArgs<float, D, R, F>{.q = c.q,
                                                                  .k = c.k,
                                                                  .v = c.v,
                                                                  .grad_o = grad_o,
                                                                  .grad_q = grad_q,
                                                                  .grad_k = grad_k,
                                                                  .grad_v = grad_v,
                                                                  .initial_state = initial,
                                                                  .grad_final_state = grad_final,
                                                                  .grad_initial_state = grad_initial,
                                                                  .span = span,
                                                                  .log_decay = c.log_decay,
                                                                  .beta = c.beta,
                                                                  .grad_log_decay = grad_decay,
                                                                  .grad_beta = grad_beta,
                                                                  .cu_seqlens = c.offsets.view},
                      c.executor)
                      .ok();
  demand(ok == c.sound, ok ? "an unsound backward call is accepted" : "a sound backward call is refused");
  const auto all = [&](auto&& holds) {
    return holds(grad_q) && holds(grad_k) && holds(grad_v) && holds(grad_initial) && holds(grad_decay) &&
           holds(grad_beta);
  };
  if (!ok) return demand(all([](auto& x) { return x.untouched(); }), "a refused backward call writes");
  demand(all([](auto& x) { return x.guards_intact(); }), "memory between the elements of a gradient is written");

  const Tensor<double, 4> before = converted<double>(key_major<F>(initial.view()));
  const Tensor<double, 4> leaving = converted<double>(key_major<F>(grad_final.view()));
  for (Index i = 0; i < c.sequences; ++i) {
    typename Case::Doubles d(c, i, before, c.sequence(i).count);
    d.problem.bidirectional = span == Span::bidirectional;
    Tensor<double, 4> q(d.q.extents()), k(d.k.extents()), v(d.v.extents()), log_decay(d.log_decay.extents()),
        state(1, c.shape.state_heads(), c.shape.key_dim, c.shape.value_dim);
    Tensor<double, 3> beta(d.beta.extents());
    reference::LinearAttentionGradients want{q, k, v, state};
    if (c.decays) want.log_decay = log_decay;
    if (c.delta) want.beta = beta;
    const Tensor<double, 4> grad = converted<double>(c.tokens_of(grad_o.view(), i));
    TensorView<const double, 4> grad_final_state;
    if (grad_final.present()) grad_final_state = run(leaving.view(), 0, i, 1);
    reference::linear_attention_backward(d.problem, grad, grad_final_state, want);
    const auto compare = [&](const auto& got, const auto& expected, const char* what) {
      if (got.present()) c.demand_close(c.tokens_of(got.view(), i), expected, what);
    };
    compare(grad_q, q, "grad_q"), compare(grad_k, k, "grad_k"), compare(grad_v, v, "grad_v");
    if constexpr (D == DecayKind::per_key) compare(grad_decay, log_decay, "grad_log_decay");
    if constexpr (R == RuleKind::delta) compare(grad_beta, beta, "grad_beta");
    if (grad_initial.present())
      c.demand_close(run(key_major<F>(grad_initial.view()), 0, i, 1), state, "grad_initial_state");
  }
}

template <DecayKind D, RuleKind R, class F>
void step(Bytes& bytes) {
  LinearAttentionCase<D, R, F> c(bytes, true);
  bool wrong_slots = false;
  const Index entries = c.draw_slots(wrong_slots);
  if (wrong_slots) c.sound = false;
  auto o = c.output(c.extents(c.token_extents(c.shape.output_heads(), c.shape.value_dim), 2));
  auto state = c.output(c.extents(c.state_extents(entries), 1));
  state.fill([&] { return c.uniform(-1, 1); });
  const auto token = [](const auto& x) { return slice_axis<1>(x.view(), 0); };
  LinearAttentionStepArgs<float, D, R, F> args{
      .q = token(c.q), .k = token(c.k), .v = token(c.v), .o = token(o), .state = state, .state_slots = c.slots.view};
  if constexpr (D == DecayKind::per_head) args.log_decay = c.log_decay;
  if constexpr (D == DecayKind::per_token || D == DecayKind::per_key) args.log_decay = token(c.log_decay);
  if constexpr (R == RuleKind::delta) args.beta = token(c.beta);
  const Tensor<double, 4> before = converted<double>(key_major<F>(state.view()));
  const bool ok = cpu::linear_attention_step(args, c.executor).ok();
  demand(ok == c.sound, ok ? "an unsound step is accepted" : "a sound step is refused");
  const TensorView<float, 4> after = key_major<F>(state.view());
  if (!ok) return demand(o.untouched() && same_states(after, before), "a refused step writes");
  demand(o.guards_intact() && state.guards_intact(), "memory between the elements of a step is written");
  std::vector<char> owned(std::size_t(entries), 0);
  for (Index i = 0; i < c.sequences; ++i) {
    const auto want = c.answer(i, before, 1, Span::causal);
    c.demand_close(run(o.view(), 0, i, 1), want.o, "o of a step");
    c.demand_close(run(after, 0, c.entry(i), 1), want.state, "state of a step");
    owned[std::size_t(c.entry(i))] = 1;
  }
  for (Index e = 0; e < entries; ++e)
    demand(owned[std::size_t(e)] || same_state(after, before, e), "another's state is written by a step");
}

template <DecayKind D, RuleKind R, class F>
void any_call(Bytes& bytes) {
  switch (bytes.upto(4)) {
    case 0:
      return forward<ChunkPolicy{}, D, R, F>(bytes);
    case 1:
      return forward<short_tiles, D, R, F>(bytes);
    case 2:
      return forward<chunked, D, R, F>(bytes);
    case 3:
      return backward<D, R, F>(bytes);
    default:
      return step<D, R, F>(bytes);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  switch (bytes.upto(2)) {
    case 0:
      any_call<DecayKind::none, RuleKind::additive, LinearAttentionForm>(bytes);
      break;
    case 1:
      any_call<DecayKind::per_key, RuleKind::additive, ValueMajor>(bytes);
      break;
    default:
      any_call<DecayKind::per_token, RuleKind::delta, LinearAttentionForm>(bytes);
      break;
  }
  return 0;
}
