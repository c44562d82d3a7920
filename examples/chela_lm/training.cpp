#include "chela_lm/training.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "chela/cpu/model/adamw.hpp"
#include "chela/model/random.hpp"
#include "chela/model/schedule.hpp"
#include "chela_lm/error.hpp"
#include "chela_lm/evaluation.hpp"
#include "chela_lm/interrupt.hpp"
#include "chela_lm/progress.hpp"

namespace chela_lm {

namespace {

/// The windows of one step. Which ones is a function of (seed, step, row).
class Batches {
 public:
  Batches(const Bytes& text, const TrainingSettings& settings)
      : text_(text),
        settings_(settings),
        random_(settings.seed, chela::stream_of("windows")),
        tokens_(std::size_t(settings.batch * settings.context)),
        targets_(tokens_.size()) {
    if (Index(text.size()) <= settings.context) {
      throw Error("the text is too short: " + std::to_string(text.size()) + " bytes to train on, a window needs " +
                  std::to_string(settings.context + 1) + "; lower --context or give a longer text");
    }
  }

  void draw(Index step) {
    const auto starts = std::uint64_t(Index(text_.size()) - settings_.context);
    for (Index row = 0; row < settings_.batch; ++row) {
      const auto begin = Index(random_.below(std::uint64_t(step * settings_.batch + row), starts));
      for (Index i = 0; i < settings_.context; ++i) {
        tokens_[std::size_t(row * settings_.context + i)] = text_[std::size_t(begin + i)];
        targets_[std::size_t(row * settings_.context + i)] = text_[std::size_t(begin + i + 1)];
      }
    }
  }

  Tokens tokens() const { return chela::contiguous(tokens_.data(), settings_.batch, settings_.context); }
  Tokens targets() const { return chela::contiguous(targets_.data(), settings_.batch, settings_.context); }

 private:
  const Bytes& text_;
  const TrainingSettings& settings_;
  chela::CounterRandom random_;
  std::vector<Token> tokens_, targets_;
};

/// Loss, gradients and update of one step after another.
class Trainer {
 public:
  Trainer(Run& run, const Bytes& text, const chela::DefaultExecutor& executor)
      : run_(run),
        batches_(text, run.checkpoint.training),
        gradients_(run.model->count()),
        ranges_(chela::decay_ranges(run.model->parameters())),
        executor_(executor) {}

  /// The loss, in bits per byte, before the update.
  double step(double progress) {
    Checkpoint& c = run_.checkpoint;
    const TrainingSettings& s = c.training;
    batches_.draw(c.step);
    const double loss =
        run_.model->loss_and_gradients(c.parameters.data(), batches_.tokens(), batches_.targets(), gradients_.data());
    const std::string name = "step " + std::to_string(c.step + 1);
    if (!std::isfinite(loss)) throw Error(name + ": the loss is not finite; lower --learning-rate");
    const chela::LearningRateSchedule schedule{
        .peak = s.learning_rate, .warm_up = s.warm_up, .last_fraction = s.last_fraction};
    const chela::AdamWArgs<float> args{.parameters = c.parameters,
                                       .gradients = gradients_,
                                       .first_moment = c.first_moment,
                                       .second_moment = c.second_moment,
                                       .ranges = &ranges_,
                                       .step = c.step + 1,
                                       .learning_rate = chela::learning_rate(schedule, progress),
                                       .settings = {.weight_decay = s.weight_decay, .largest_norm = s.largest_norm}};
    require_ok(chela::cpu::adamw(args, executor_), name);
    ++c.step;
    return loss / std::numbers::ln2;
  }

 private:
  Run& run_;
  Batches batches_;
  chela::Tensor<float, 1> gradients_;
  std::vector<chela::DecayRange> ranges_;
  chela::DefaultExecutor executor_;
};

}  // namespace

TrainingResult train(Run& run, const SplitText& text, const std::filesystem::path& path, double save_seconds,
                     const chela::DefaultExecutor& executor) {
  constexpr Index sample_every = 100, sample_windows = 8;  // a sample costs about as much as a third of a step
  Checkpoint& c = run.checkpoint;
  const TrainingSettings& s = c.training;
  const bool timed = s.seconds > 0;
  const Index first_step = c.step;
  const double earlier = timed ? c.seconds : 0;
  Trainer trainer(run, text.training, executor);
  TrainingResult result;
  ProgressReport report{.steps = timed ? 0 : s.steps};
  Progress progress;
  const Timer timer;
  Timer since_saved;

  const auto share = [&](Index steps) {
    return timed ? (earlier + timer.seconds()) / s.seconds : double(steps) / double(s.steps);
  };
  while (!Interrupt::asked() && (timed ? share(c.step) < 1 : c.step < s.steps)) {
    const double bits = trainer.step(share(c.step + 1));
    const double memory = 1 - 1 / std::min(50.0, double(c.step - first_step));
    result.training_bits = memory * result.training_bits + (1 - memory) * bits;
    if (c.step % sample_every == 0)
      report.held_out_bits =
          sampled_bits_per_byte(*run.model, c.parameters.data(), text.held_out, s.context, sample_windows);
    result.seconds = timer.seconds();
    result.tokens_per_second = double((c.step - first_step) * s.batch * s.context) / result.seconds;
    if (timed) c.seconds = earlier + result.seconds;

    report.step = c.step;
    report.share = share(c.step);
    report.tokens_per_second = result.tokens_per_second;
    report.training_bits = result.training_bits;
    report.seconds_left =
        timed ? s.seconds - c.seconds : double(s.steps - c.step) * result.seconds / double(c.step - first_step);
    progress.show(report, report.share >= 1);
    if (since_saved.seconds() > save_seconds) {
      save(run, path);
      since_saved = {};
    }
  }
  result.interrupted = Interrupt::asked() && share(c.step) < 1;
  save(run, path);
  return result;
}

}  // namespace chela_lm
