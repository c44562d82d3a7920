// The short convolution, and the short-long one, on arguments of any kind: a sound call must give the right answer and
// write nothing else, any other must be refused and write nothing. Built with libFuzzer (CHELA_BUILD_FUZZERS).
#include "chela/cpu/conv/short_long.hpp"
#include "chela/reference/short_long.hpp"
#include "fuzz/conv_case.hpp"

using namespace chela;
using namespace chela::test;

namespace {

template <int Width>
struct ShortCase : ConvCase {
  Placed<float, 2> taps;
  Placed<float, 1> bias;

  ShortCase(Bytes& b, bool step, bool ragged_calls = true) : ConvCase(b, step, ragged_calls) {
    taps = input(extents(std::array<Index, 2>{channels, Width}));
    if (bytes.upto(1)) bias = input(extents(std::array<Index, 1>{channels}));
    sums_of(std::max<Index>(Width, batch * tokens) + 1);
  }
  std::array<Index, 3> state_extents(Index entries) const { return {entries, Width - 1, channels}; }
};

/// How many steps each state has seen.
struct DrawnPositions {
  Index all = 0;
  DrawnIndices each;

  explicit DrawnPositions(DrawnCase& c) {
    if (c.bytes.once_in(3)) {
      for (Index i = 0; i < c.sequences; ++i) each.values.push_back(c.bytes.upto(9));
      if (c.bytes.once_in(20) && c.sequences > 0) each.values.back() = -1, c.sound = false;
      if (c.bytes.once_in(40)) each.values.push_back(0), c.sound = false;
      each.place(c.bytes);
    } else if (c.bytes.once_in(3)) {
      all = c.bytes.upto(9);
    }
    if (c.bytes.once_in(60)) all = -1, c.sound = false;
  }
  Index operator[](Index i) const { return each.view.present() ? each.view[i] : all; }
};

/// An entry of states, oldest row first.
Tensor<double, 3> oldest_first(const Tensor<double, 3>& states, Index entry, Index position) {
  if (states.data() == nullptr) return {};
  const Index rows = states.extents()[1];
  Tensor<double, 3> out(Index(1), rows, states.extents()[2]);
  for_each_index(out.view(), [&](Index, Index r, Index d) { out(0, r, d) = states(entry, (r + position) % rows, d); });
  return out;
}

/// Whether each element is what it was before.
void demand_same(TensorView<float, 3> now, const Tensor<double, 3>& before, const char* what) {
  for_each_index(now, [&](auto... i) { demand(double(now(i...)) == before(i...), what); });
}

template <int Width, Activation A>
void forward(Bytes& bytes) {
  ShortCase<Width> c(bytes, false);
  bool wrong_slots = false;
  const Index entries = c.draw_slots(wrong_slots);
  const bool in_place = bytes.once_in(3);
  auto y = c.output(c.extents(c.rows()));
  Placed<float, 3> initial, separate;
  const auto states = [&] { return c.extents(c.state_extents(entries), c.slots.view.present() ? 1 : 0); };
  if (in_place) {
    initial = c.output(states());
    initial.fill([&] { return c.uniform(-1, 1); });
  } else {
    if (bytes.upto(1)) initial = c.input(states());
    if (bytes.upto(1)) separate = c.output(states());
  }
  const Placed<float, 3>& final_state = in_place ? initial : separate;
  if (wrong_slots && (initial.present() || final_state.present())) c.sound = false;
  const DrawnPositions positions(c);
  const Tensor<double, 3> before = in_double(initial.view());
  const bool ok = cpu::short_conv<Width, A>(ShortConvArgs<float>{.x = c.x,
                                                                 .taps = c.taps,
                                                                 .bias = c.bias,
                                                                 .y = y,
                                                                 .initial_state = initial,
                                                                 .final_state = final_state,
                                                                 .cu_seqlens = c.offsets.view,
                                                                 .state_slots = c.slots.view,
                                                                 .position = positions.all,
                                                                 .positions = positions.each.view},
                                            c.executor)
                      .ok();
  demand(ok == c.sound, ok ? "an unsound call is accepted" : "a sound call is refused");
  if (!ok) {
    demand(y.untouched() && separate.untouched(), "a refused call writes");
    return demand_same(initial.view(), before, "a refused call writes to the state");
  }
  demand(y.guards_intact() && initial.guards_intact() && separate.guards_intact(),
         "memory between the elements is written");
  const Tensor<double, 2> taps = in_double(c.taps.view());
  const Tensor<double, 1> bias = in_double(c.bias.view());
  std::vector<char> owned(std::size_t(entries), 0);
  for (Index i = 0; i < c.sequences; ++i) {
    const Tensor<double, 3> x = c.doubles_of(c.x.view(), i), state = oldest_first(before, c.entry(i), positions[i]);
    Tensor<double, 3> want(x.extents()), want_state(Index(1), Index(Width - 1), c.channels);
    reference::short_conv(x, taps, bias, state, A == Activation::silu, want, want_state);
    c.demand_close(c.tokens_of(y.view(), i), want, "y");
    if (!final_state.present()) continue;
    owned[std::size_t(c.entry(i))] = 1;
    demand_same(run(final_state.view(), 0, c.entry(i), 1), want_state, "final_state");
  }
  for (Index e = 0; e < entries && final_state.present(); ++e) {
    if (owned[std::size_t(e)]) continue;
    for_each_index(slice(final_state.view(), e), [&, at = slice(final_state.view(), e)](Index r, Index d) {
      demand(double(at(r, d)) == (in_place ? before(e, r, d) : double(separate.guard())), "another's state is written");
    });
  }
}

template <int Width, Activation A>
void backward(Bytes& bytes) {
  ShortCase<Width> c(bytes, false);
  auto grad_y = c.input(c.extents(c.rows()));
  const auto states = c.state_extents(c.sequences);
  auto initial = c.maybe_input(states), grad_final = c.maybe_input(states);
  auto grad_x = c.maybe_output(c.rows()), grad_initial = c.maybe_output(states);
  auto grad_taps = c.maybe_output(std::array<Index, 2>{c.channels, Width});
  auto grad_bias = c.maybe_output(std::array<Index, 1>{c.channels});
  const bool ok = cpu::short_conv_backward<Width, A>(ShortConvBackwardArgs<float>{.x = c.x,
                                                                                  .taps = c.taps,
                                                                                  .bias = c.bias,
                                                                                  .initial_state = initial,
                                                                                  .grad_y = grad_y,
                                                                                  .grad_final_state = grad_final,
                                                                                  .grad_x = grad_x,
                                                                                  .grad_taps = grad_taps,
                                                                                  .grad_bias = grad_bias,
                                                                                  .grad_initial_state = grad_initial,
                                                                                  .cu_seqlens = c.offsets.view},
                                                     c.executor)
                      .ok();
  demand(ok == c.sound, ok ? "an unsound backward call is accepted" : "a sound backward call is refused");
  const auto all = [&](auto&& holds) {
    return holds(grad_x) && holds(grad_taps) && holds(grad_bias) && holds(grad_initial);
  };
  if (!ok) return demand(all([](auto& x) { return x.untouched(); }), "a refused backward call writes");
  demand(all([](auto& x) { return x.guards_intact(); }), "memory between the elements of a gradient is written");
  const Tensor<double, 2> taps = in_double(c.taps.view());
  const Tensor<double, 1> bias = in_double(c.bias.view());
  Tensor<double, 2> sum_taps(taps.extents());
  Tensor<double, 1> sum_bias(c.channels);
  for (Index i = 0; i < c.sequences; ++i) {
    const Tensor<double, 3> x = c.doubles_of(c.x.view(), i), grad = c.doubles_of(grad_y.view(), i);
    const Tensor<double, 3> state = state_in_double(initial.view(), i), flowing = state_in_double(grad_final.view(), i);
    Tensor<double, 3> want(x.extents()), want_state(Index(1), Index(Width - 1), c.channels);
    Tensor<double, 2> want_taps(taps.extents());
    Tensor<double, 1> want_bias(c.channels);
    reference::short_conv_backward(x, taps, bias, state, A == Activation::silu, grad, flowing, want, want_taps,
                                   want_bias, want_state);
    for_each_index(sum_taps.view(), [&](auto... e) { sum_taps(e...) += want_taps(e...); });
    for_each_index(sum_bias.view(), [&](auto... e) { sum_bias(e...) += want_bias(e...); });
    if (grad_x.present()) c.demand_close(c.tokens_of(grad_x.view(), i), want, "grad_x");
    if (grad_initial.present()) c.demand_close(run(grad_initial.view(), 0, i, 1), want_state, "grad_initial_state");
  }
  if (grad_taps.present()) c.demand_close(grad_taps.view(), sum_taps, "grad_taps");
  if (grad_bias.present()) c.demand_close(grad_bias.view(), sum_bias, "grad_bias");
}

template <int Width, Activation A>
void step(Bytes& bytes) {
  ShortCase<Width> c(bytes, true);
  bool wrong_slots = false;
  const Index entries = c.draw_slots(wrong_slots);
  if (wrong_slots) c.sound = false;
  auto y = c.output(c.extents(c.rows(), 2));
  auto state = c.output(c.extents(c.state_extents(entries), 1));
  state.fill([&] { return c.uniform(-1, 1); });
  const DrawnPositions positions(c);
  const auto token = [](const auto& x) { return slice_axis<1>(x.view(), 0); };
  const Tensor<double, 3> before = in_double(state.view());
  const bool ok = cpu::short_conv_step<Width, A>(ShortConvStepArgs<float>{.x = token(c.x),
                                                                          .taps = c.taps,
                                                                          .bias = c.bias,
                                                                          .y = token(y),
                                                                          .state = state,
                                                                          .position = positions.all,
                                                                          .positions = positions.each.view,
                                                                          .state_slots = c.slots.view},
                                                 c.executor)
                      .ok();
  demand(ok == c.sound, ok ? "an unsound step is accepted" : "a sound step is refused");
  if (!ok) {
    demand(y.untouched(), "a refused step writes");
    return demand_same(state.view(), before, "a refused step writes to the state");
  }
  demand(y.guards_intact() && state.guards_intact(), "memory between the elements of a step is written");
  const Tensor<double, 2> taps = in_double(c.taps.view());
  const Tensor<double, 1> bias = in_double(c.bias.view());
  Tensor<double, 3> after = before;
  for (Index i = 0; i < c.sequences; ++i) {
    const Tensor<double, 3> x = c.doubles_of(c.x.view(), i), in = oldest_first(before, c.entry(i), positions[i]);
    Tensor<double, 3> want(x.extents());
    reference::short_conv(x, taps, bias, in, A == Activation::silu, want, {});
    c.demand_close(c.tokens_of(y.view(), i), want, "y of a step");
    for (Index d = 0; d < c.channels && Width > 1; ++d)
      after(c.entry(i), positions[i] % std::max(Width - 1, 1), d) = x(0, 0, d);
  }
  demand_same(state.view(), after, "state of a step");
}

/// Both stages.
template <int Width>
struct ShortLongCase : ShortCase<Width> {
  Placed<float, 2> long_taps, back_taps;
  Placed<float, 1> skip;
  Placed<float, 3> short_initial, long_initial;
  Index length_of_kernel = 1, back = 0;

  explicit ShortLongCase(Bytes& b) : ShortCase<Width>(b, false, false) {
    length_of_kernel = this->length(b.once_in(4) ? 120 : 12);
    long_taps = this->kernel(length_of_kernel);
    if (b.once_in(4)) back = b.upto(9), back_taps = this->kernel(back);
    if (b.upto(1)) skip = this->input(this->extents(std::array<Index, 1>{this->channels}));
    short_initial = this->maybe_input(this->state_extents(this->batch));
    long_initial = this->maybe_input(long_state_extents());
    this->sums_of(std::max<Index>(length_of_kernel + back, this->batch * this->tokens) + Width);
  }
  std::array<Index, 3> long_state_extents() const { return {this->batch, length_of_kernel - 1, this->channels}; }
};

/// A case's inputs in double, and how the reference takes them.
struct ShortLongDoubles {
  Tensor<double, 3> x, short_initial, long_initial;
  Tensor<double, 2> short_taps, taps, back_taps;
  Tensor<double, 1> short_bias, skip;

  template <int Width>
  explicit ShortLongDoubles(const ShortLongCase<Width>& c)
      : x(in_double(c.x.view())),
        short_initial(in_double(c.short_initial.view())),
        long_initial(in_double(c.long_initial.view())),
        short_taps(in_double(c.taps.view())),
        taps(in_double(c.long_taps.view())),
        back_taps(in_double(c.back_taps.view())),
        short_bias(in_double(c.bias.view())),
        skip(in_double(c.skip.view())) {}
  reference::ShortLongConvInputs inputs() const {
    return {x, short_taps, short_bias, taps, back_taps, skip, short_initial, long_initial};
  }
};

template <int Width>
void short_long_forward(Bytes& bytes) {
  ShortLongCase<Width> c(bytes);
  auto z = c.output(c.extents(c.rows()));
  auto inner = c.maybe_output(c.rows());
  auto short_final = c.maybe_output(c.state_extents(c.batch)), long_final = c.maybe_output(c.long_state_extents());
  const bool ok = cpu::short_long_conv<Width>(ShortLongConvArgs<float>{.x = c.x,
                                                                       .short_taps = c.taps,
                                                                       .short_bias = c.bias,
                                                                       .taps = c.long_taps,
                                                                       .back_taps = c.back_taps,
                                                                       .skip = c.skip,
                                                                       .z = z,
                                                                       .inner = inner,
                                                                       .short_initial_state = c.short_initial,
                                                                       .long_initial_state = c.long_initial,
                                                                       .short_final_state = short_final,
                                                                       .long_final_state = long_final},
                                              c.executor)
                      .ok();
  demand(ok == c.sound, ok ? "an unsound short-long call is accepted" : "a sound short-long call is refused");
  const auto all = [&](auto&& holds) { return holds(z) && holds(inner) && holds(short_final) && holds(long_final); };
  if (!ok) return demand(all([](auto& x) { return x.untouched(); }), "a refused short-long call writes");
  demand(all([](auto& x) { return x.guards_intact(); }), "memory between the elements of a short-long call is written");
  const ShortLongDoubles d(c);
  Tensor<double, 3> want(c.rows()), want_inner(c.rows()), want_short(c.state_extents(c.batch)),
      want_long(c.long_state_extents());
  reference::short_long_conv(d.inputs(), want_inner, want, want_short, want_long);
  c.demand_close(z.view(), want, "z");
  if (inner.present()) c.demand_close(inner.view(), want_inner, "inner");
  if (short_final.present()) c.demand_close(short_final.view(), want_short, "short_final_state");
  if (long_final.present()) c.demand_close(long_final.view(), want_long, "long_final_state");
}

template <int Width>
void short_long_backward(Bytes& bytes) {
  ShortLongCase<Width> c(bytes);
  auto grad_z = c.input(c.extents(c.rows()));
  auto grad_x = c.maybe_output(c.rows());
  auto grad_short_taps = c.maybe_output(std::array<Index, 2>{c.channels, Width});
  auto grad_taps = c.maybe_output(std::array<Index, 2>{c.channels, c.length_of_kernel});
  auto grad_short_bias = c.maybe_output(std::array<Index, 1>{c.channels});
  auto grad_skip = c.maybe_output(std::array<Index, 1>{c.channels});
  Placed<float, 2> grad_back;
  if (c.back_taps.present()) grad_back = c.maybe_output(std::array<Index, 2>{c.channels, c.back});
  auto grad_short = c.maybe_output(c.state_extents(c.batch)), grad_long = c.maybe_output(c.long_state_extents());
  const ShortLongConvBackwardArgs<float> args{.x = c.x,
                                              .short_taps = c.taps,
                                              .short_bias = c.bias,
                                              .taps = c.long_taps,
                                              .back_taps = c.back_taps,
                                              .skip = c.skip,
                                              .short_initial_state = c.short_initial,
                                              .long_initial_state = c.long_initial,
                                              .grad_z = grad_z,
                                              .grad_x = grad_x,
                                              .grad_short_taps = grad_short_taps,
                                              .grad_short_bias = grad_short_bias,
                                              .grad_taps = grad_taps,
                                              .grad_back_taps = grad_back,
                                              .grad_skip = grad_skip,
                                              .grad_short_initial_state = grad_short,
                                              .grad_long_initial_state = grad_long};
  const bool ok = cpu::short_long_conv_backward<Width>(args, c.executor).ok();
  demand(ok == c.sound, ok ? "an unsound short-long backward call is accepted" : "a sound one is refused");
  const auto all = [&](auto&& holds) {
    return holds(grad_x) && holds(grad_short_taps) && holds(grad_taps) && holds(grad_short_bias) && holds(grad_skip) &&
           holds(grad_back) && holds(grad_short) && holds(grad_long);
  };
  if (!ok) return demand(all([](auto& x) { return x.untouched(); }), "a refused short-long backward call writes");
  demand(all([](auto& x) { return x.guards_intact(); }), "memory between the elements of a gradient is written");
  const ShortLongDoubles d(c);
  Tensor<double, 3> x(c.rows()), short_state(c.state_extents(c.batch)), long_state(c.long_state_extents());
  Tensor<double, 2> short_taps(d.short_taps.extents()), taps(d.taps.extents()), back_taps(c.channels, c.back);
  Tensor<double, 1> short_bias(c.channels), skip(c.channels);
  reference::short_long_conv_backward(d.inputs(), in_double(grad_z.view()),
                                      {x, short_taps, short_bias, taps, back_taps, skip, short_state, long_state});
  const auto compare = [&](const auto& got, const auto& want, const char* what) {
    if (got.present()) c.demand_close(got.view(), want, what);
  };
  compare(grad_x, x, "grad_x"), compare(grad_short_taps, short_taps, "grad_short_taps");
  compare(grad_taps, taps, "grad_taps"), compare(grad_back, back_taps, "grad_back_taps");
  compare(grad_short_bias, short_bias, "grad_short_bias");
  if (c.skip.present()) compare(grad_skip, skip, "grad_skip");
  compare(grad_short, short_state, "grad_short_initial_state"),
      compare(grad_long, long_state, "grad_long_initial_state");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  switch (bytes.upto(10)) {
    case 0:
      forward<4, Activation::silu>(bytes);
      break;
    case 1:
      forward<1, Activation::none>(bytes);
      break;
    case 2:
      forward<2, Activation::none>(bytes);
      break;
    case 3:
      forward<19, Activation::silu>(bytes);
      break;
    case 4:
      backward<4, Activation::silu>(bytes);
      break;
    case 5:
      backward<1, Activation::none>(bytes);
      break;
    case 6:
      backward<19, Activation::none>(bytes);
      break;
    case 7:
      step<4, Activation::silu>(bytes);
      break;
    case 8:
      step<1, Activation::none>(bytes);
      break;
    case 9:
      short_long_forward<4>(bytes);
      break;
    default:
      short_long_backward<4>(bytes);
      break;
  }
  return 0;
}
