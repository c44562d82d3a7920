// The long convolution on arguments of any kind, in each of its ways, backwards, step by step and as a stream: a sound
// call must give the right answer and write nothing else, any other must be refused and write nothing. Built with
// libFuzzer (CHELA_BUILD_FUZZERS).
#include "chela/cpu/conv/long.hpp"
#include "chela/reference/long.hpp"
#include "fuzz/conv_case.hpp"

using namespace chela;
using namespace chela::test;

namespace {

constexpr LongConvPolicy direct{.method = LongConvMethod::direct};
constexpr LongConvPolicy whole{.method = LongConvMethod::transform};
constexpr LongConvPolicy blocks{.method = LongConvMethod::blocks, .least_block = 32};
constexpr LongConvPolicy partial{.direct_products = 2, .least_block = 32, .taps = 5};

/// A kernel, and whether the call is given it ready made.
struct LongCase : ConvCase {
  Placed<float, 2> taps, back_taps;
  Placed<float, 1> skip;
  Index length_of_kernel = 1, back = 0, used = 1;

  /// Of the taps `part` take part, 0 for all.
  LongCase(Bytes& b, bool step, Index part = 0) : ConvCase(b, step, true) {
    length_of_kernel = length(bytes.once_in(3) ? 200 : 12);
    used = part > 0 ? std::min(part, length_of_kernel) : length_of_kernel;
    taps = kernel(length_of_kernel);
    if (!step && bytes.once_in(4)) back = bytes.upto(bytes.once_in(3) ? 150 : 9), back_taps = kernel(back);
    if (bytes.upto(1)) skip = input(extents(std::array<Index, 1>{channels}));
    sums_of(std::max<Index>(length_of_kernel + back, batch * tokens) + 1);
  }

  std::array<Index, 3> state_extents() const { return {sequences, length_of_kernel - 1, channels}; }

  struct Kernel {
    Tensor<double, 2> taps, back_taps;
    Tensor<double, 1> skip;
  };
  Kernel kernel_in_double() const {
    Kernel k{in_double(taps.view()), in_double(back_taps.view()), in_double(skip.view())};
    for_each_index(k.taps.view(), [&](Index d, Index j) { k.taps(d, j) *= j < used; });
    return k;
  }

  /// A kernel made ready for some number of tokens; a call that it does not serve is not sound.
  template <LongConvPolicy P>
  auto spectrum(bool needs_state) {
    const Index most = bytes.once_in(10) ? bytes.upto(tokens) : tokens + bytes.upto(3);
    const bool with_state = needs_state ? !bytes.once_in(10) : bytes.upto(1) == 1;
    const bool usable =
        taps.view().extents[0] == channels && (!back_taps.present() || back_taps.view().extents[0] == channels);
    auto made = cpu::kernel_spectrum<P>(taps.view(), back_taps.view(), most, executor, {.with_state = with_state});
    const bool same_channels = !back_taps.present() || back_taps.view().extents[0] == taps.view().extents[0];
    demand(made.status().ok() == same_channels, "a kernel's spectrum, or none, against its extents");
    if (!usable || (needs_state && !with_state)) sound = false;
    for (Index i = 0; sound && i < sequences; ++i)
      if (sequence(i).count > most) sound = false;
    if (!offsets.view.present() && tokens > most) sound = false;
    return made;
  }
};

template <LongConvPolicy P>
void forward(Bytes& bytes) {
  LongCase c(bytes, false, P.taps);
  const bool given = bytes.once_in(3), in_place = bytes.once_in(4);
  auto y = c.output(c.extents(c.rows()));
  Placed<float, 3> initial, separate;
  if (in_place) {
    initial = c.output(c.extents(c.state_extents()));
    initial.fill([&] { return c.uniform(-1, 1); });
  } else {
    initial = c.maybe_input(c.state_extents());
    if (bytes.upto(1)) separate = c.output(c.extents(c.state_extents()));
  }
  const Placed<float, 3>& final_state = in_place ? initial : separate;
  const LongConvArgs<float> args{.x = c.x,
                                 .taps = c.taps,
                                 .back_taps = c.back_taps,
                                 .skip = c.skip,
                                 .y = y,
                                 .initial_state = initial,
                                 .final_state = final_state,
                                 .cu_seqlens = c.offsets.view};
  const Tensor<double, 3> before = in_double(initial.view());
  const bool ok = given ? cpu::long_conv(args, c.spectrum<P>(initial.present()), c.executor).ok()
                        : cpu::long_conv<P>(args, c.executor).ok();
  demand(ok == c.sound, ok ? "an unsound call is accepted" : "a sound call is refused");
  if (!ok) {
    demand(y.untouched() && separate.untouched(), "a refused call writes");
    for_each_index(before.view(), [&](auto... i) {
      demand(before(i...) == double(initial.view()(i...)), "a refused call writes to the state");
    });
    return;
  }
  demand(y.guards_intact() && initial.guards_intact() && separate.guards_intact(),
         "memory between the elements is written");
  const auto kernel = c.kernel_in_double();
  for (Index i = 0; i < c.sequences; ++i) {
    const Tensor<double, 3> x = c.doubles_of(c.x.view(), i), state = state_in_double(before.view(), i);
    Tensor<double, 3> want(x.extents()), want_state(Index(1), c.length_of_kernel - 1, c.channels);
    reference::long_conv(x, kernel.taps, kernel.back_taps, kernel.skip, state, want, want_state);
    if (P.eighths == 8) c.demand_close(c.tokens_of(y.view(), i), want, "y");
    for_each_index(c.tokens_of(y.view(), i), [&, at = c.tokens_of(y.view(), i)](auto... e) {
      demand(std::isfinite(at(e...)) && at(e...) != y.guard(), "an output is not written");
    });
    if (!final_state.present()) continue;
    for_each_index(want_state.view(), [&, at = slice(final_state.view(), i)](Index, Index r, Index d) {
      demand(double(at(r, d)) == want_state(0, r, d), "final_state");
    });
  }
}

template <LongConvPolicy P>
void backward(Bytes& bytes) {
  LongCase c(bytes, false, P.taps);
  const bool given = bytes.once_in(3);
  auto grad_y = c.input(c.extents(c.rows()));
  auto initial = c.maybe_input(c.state_extents()), grad_final = c.maybe_input(c.state_extents());
  auto grad_x = c.maybe_output(c.rows()), grad_initial = c.maybe_output(c.state_extents());
  auto grad_taps = c.maybe_output(std::array<Index, 2>{c.channels, c.length_of_kernel});
  Placed<float, 2> grad_back;
  if (c.back_taps.present()) grad_back = c.maybe_output(std::array<Index, 2>{c.channels, c.back});
  auto grad_skip = c.maybe_output(std::array<Index, 1>{c.channels});
  const LongConvBackwardArgs<float> args{.x = c.x,
                                         .taps = c.taps,
                                         .back_taps = c.back_taps,
                                         .skip = c.skip,
                                         .initial_state = initial,
                                         .grad_y = grad_y,
                                         .grad_final_state = grad_final,
                                         .grad_x = grad_x,
                                         .grad_taps = grad_taps,
                                         .grad_back_taps = grad_back,
                                         .grad_skip = grad_skip,
                                         .grad_initial_state = grad_initial,
                                         .cu_seqlens = c.offsets.view};
  const bool needs_state = initial.present() || grad_initial.present();
  const bool ok = given ? cpu::long_conv_backward(args, c.spectrum<P>(needs_state), c.executor).ok()
                        : cpu::long_conv_backward<P>(args, c.executor).ok();
  demand(ok == c.sound, ok ? "an unsound backward call is accepted" : "a sound backward call is refused");
  const auto all = [&](auto&& holds) {
    return holds(grad_x) && holds(grad_taps) && holds(grad_back) && holds(grad_skip) && holds(grad_initial);
  };
  if (!ok) return demand(all([](auto& x) { return x.untouched(); }), "a refused backward call writes");
  demand(all([](auto& x) { return x.guards_intact(); }), "memory between the elements of a gradient is written");

  const auto kernel = c.kernel_in_double();
  Tensor<double, 2> taps(c.channels, c.length_of_kernel), back_taps(c.channels, c.back);
  Tensor<double, 1> skip(c.channels);
  const auto add = [](auto& to, const auto& term) {
    for (Index i = 0; i < to.size(); ++i) to.data()[i] += term.data()[i];
  };
  for (Index i = 0; i < c.sequences; ++i) {
    const Tensor<double, 3> x = c.doubles_of(c.x.view(), i), grad = c.doubles_of(grad_y.view(), i);
    const Tensor<double, 3> state = state_in_double(initial.view(), i), flowing = state_in_double(grad_final.view(), i);
    Tensor<double, 3> want(x.extents()), want_state(Index(1), c.length_of_kernel - 1, c.channels);
    Tensor<double, 2> want_taps(taps.extents()), want_back(back_taps.extents());
    Tensor<double, 1> want_skip(skip.extents());
    reference::long_conv_backward(x, kernel.taps, kernel.back_taps, kernel.skip, state, grad, want, want_taps,
                                  want_back, want_skip, want_state, flowing);
    add(taps, want_taps), add(back_taps, want_back), add(skip, want_skip);
    if (grad_x.present()) c.demand_close(c.tokens_of(grad_x.view(), i), want, "grad_x");
    if (grad_initial.present()) c.demand_close(run(grad_initial.view(), 0, i, 1), want_state, "grad_initial_state");
  }
  for_each_index(taps.view(), [&](Index d, Index j) { taps(d, j) *= j < c.used; });
  if (!c.skip.present()) skip.fill(0);
  if (grad_taps.present()) c.demand_close(grad_taps.view(), taps, "grad_taps");
  if (grad_back.present()) c.demand_close(grad_back.view(), back_taps, "grad_back_taps");
  if (grad_skip.present() && c.skip.present()) c.demand_close(grad_skip.view(), skip, "grad_skip");
}

/// Inputs of the token `position` and those before it, oldest first, become output rows by the reference.
Tensor<double, 3> last_output(const LongCase& c, const Tensor<double, 3>& inputs) {
  const auto kernel = c.kernel_in_double();
  const Index b = inputs.extents()[0], last = inputs.extents()[1] - 1;
  Tensor<double, 3> y(b, Index(1), c.channels);
  for_each_index(y.view(), [&](Index i, Index, Index d) {
    y(i, 0, d) = reference::long_conv_at(inputs, kernel.taps, {}, kernel.skip, {}, i, last, d);
  });
  return y;
}

void step(Bytes& bytes) {
  LongCase c(bytes, true);
  auto y = c.output(c.extents(c.rows(), 2));
  if (y.view().extents[1] != 1) c.sound = false;
  Index slots = c.length_of_kernel + bytes.upto(3), position = bytes.upto(255);
  if (bytes.once_in(30) && c.length_of_kernel > 1) slots = bytes.upto(c.length_of_kernel - 1), c.sound = false;
  if (bytes.once_in(40)) position = -1 - bytes.upto(1), c.sound = false;
  auto ring = c.output(c.extents(std::array<Index, 3>{c.batch, slots, c.channels}, 2));
  ring.fill([&] { return c.uniform(-1, 1); });
  const Tensor<double, 3> before = in_double(ring.view());
  const auto token = [](const auto& x) { return slice_axis<1>(x.view(), 0); };
  const bool ok =
      cpu::long_conv_step(
          LongConvStepArgs<float>{
              .x = token(c.x), .taps = c.taps, .skip = c.skip, .y = token(y), .ring = ring, .position = position},
          c.executor)
          .ok();
  demand(ok == c.sound, ok ? "an unsound step is accepted" : "a sound step is refused");
  for_each_index(before.view(), [&](Index b, Index r, Index d) {
    const bool written = ok && r == position % slots;
    demand(double(ring.view()(b, r, d)) == (written ? double(c.x.view()(b, 0, d)) : before(b, r, d)), "ring");
  });
  if (!ok) return demand(y.untouched(), "a refused step writes");
  demand(y.guards_intact() && ring.guards_intact(), "memory between the elements of a step is written");
  const Index met = std::min(position, c.length_of_kernel - 1);
  Tensor<double, 3> inputs(c.batch, met + 1, c.channels);
  for_each_index(inputs.view(), [&](Index b, Index t, Index d) {
    inputs(b, t, d) = t == met ? double(c.x.view()(b, 0, d)) : before(b, (position - met + t) % slots, d);
  });
  c.demand_close(y.view(), last_output(c, inputs), "y of a step");
}

/// As many tokens as are drawn, after some that a prefill brings.
void stream(Bytes& bytes) {
  LongCase c(bytes, false);
  c.back_taps = {};
  auto seen = c.maybe_input(std::array<Index, 3>{c.batch, bytes.upto(220), c.channels});
  auto y = c.output(c.extents(c.rows()));
  if (c.taps.view().extents[0] != c.channels) c.sound = false;
  if (!c.sound || c.offsets.view.present()) return;  // steps have no offsets; what they refuse is in `step`
  const cpu::LongConvStreamKernel<float> kernel(c.taps.view(), c.executor);
  cpu::LongConvStream<float> state(kernel, c.batch);
  demand(kernel.status().ok(), "a sound stream is refused");
  Index prefilled = 0;
  if (seen.present()) {
    demand(cpu::long_conv_stream_prefill(seen.view(), kernel, state, c.executor).ok(), "a sound prefill is refused");
    prefilled = seen.view().extents[1];
  }
  for (Index t = 0; t < c.tokens; ++t)
    demand(cpu::long_conv_stream_step(
               LongConvStreamArgs<float>{
                   .x = slice_axis<1>(c.x.view(), t), .skip = c.skip, .y = slice_axis<1>(y.view(), t)},
               kernel, state, c.executor)
               .ok(),
           "a sound step of a stream is refused");
  demand(y.guards_intact(), "memory between the elements of a stream is written");
  const auto k = c.kernel_in_double();
  Tensor<double, 3> inputs(c.batch, prefilled + c.tokens, c.channels), all(inputs.extents());
  for_each_index(inputs.view(), [&](Index b, Index t, Index d) {
    inputs(b, t, d) = t < prefilled ? seen.view()(b, t, d) : c.x.view()(b, t - prefilled, d);
  });
  reference::long_conv(inputs, k.taps, {}, k.skip, {}, all, {});
  const Tensor<double, 3> want = converted<double>(run(all.view(), 1, prefilled, c.tokens));
  c.sums_of(c.terms + prefilled);
  c.demand_close(y.view(), want, "y of a stream");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  switch (bytes.upto(11)) {
    case 0:
      forward<LongConvPolicy{}>(bytes);
      break;
    case 1:
      forward<direct>(bytes);
      break;
    case 2:
      forward<whole>(bytes);
      break;
    case 3:
      forward<blocks>(bytes);
      break;
    case 4:
      forward<partial>(bytes);
      break;
    case 5:
      forward<LongConvPolicy{.eighths = 2}>(bytes);
      break;
    case 6:
      backward<direct>(bytes);
      break;
    case 7:
      backward<whole>(bytes);
      break;
    case 8:
      backward<blocks>(bytes);
      break;
    case 9:
      backward<partial>(bytes);
      break;
    case 10:
      step(bytes);
      break;
    default:
      stream(bytes);
      break;
  }
  return 0;
}
