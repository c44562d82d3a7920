// A byte-level language model of CHELA blocks: train it on any text, measure it, write with it.
//
//   chela_lm train --text folder/ --checkpoint my.safetensors
//   chela_lm eval --text folder/ --checkpoint my.safetensors
//   chela_lm generate --checkpoint my.safetensors --prompt "=head1 "
//   chela_lm demo
#include <CLI/CLI.hpp>
#include <cstdio>
#include <new>
#include <vector>

#include "chela_lm/demo.hpp"
#include "chela_lm/evaluation.hpp"
#include "chela_lm/interrupt.hpp"
#include "chela_lm/output.hpp"
#include "chela_lm/progress.hpp"
#include "chela_lm/training.hpp"

namespace {
using namespace chela_lm;

/// Flags of all subcommands; each subcommand offers those that it reads.
struct Options {
  std::string text;
  std::string checkpoint = "chela_lm.safetensors";
  int threads = 0;
  ModelSettings model;
  TrainingSettings training;
  GenerationSettings generation;
  bool resume = false;
  bool overwrite = false;
  double save_seconds = 60;
  std::string part = "held-out";
  bool stateful = false;
};

chela::DefaultExecutor executor_for(int threads) {
#if defined(_OPENMP)
  if (threads > 0) return chela::DefaultExecutor(threads);
#endif
  (void)threads;
  return {};
}

Bytes text_of(const Options& o) { return read_text(o.text.empty() ? default_text() : std::filesystem::path(o.text)); }

void add_common(CLI::App& app, Options& o) {
  app.add_option("--checkpoint", o.checkpoint, "File of the model (safetensors)")->capture_default_str();
  app.add_option("--threads", o.threads, "Threads; 0 for one per core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

void add_text(CLI::App& app, Options& o) {
  app.add_option(
      "--text", o.text,
      "File, or folder of files at any depth, read as bytes; Perl's manual by default. One sixteenth, in blocks "
      "from all over the text, is held out of training");
}

/// Flags that a checkpoint decides once it is there.
std::vector<CLI::Option*> add_settings(CLI::App& app, Options& o) {
  std::vector<CLI::Option*> flags;
  const auto add = [&](const char* name, auto& value, const char* meaning) {
    flags.push_back(app.add_option(name, value, meaning)->capture_default_str());
  };
  add("--layers", o.model.layers, "CHELA blocks");
  add("--width", o.model.width, "Width of the blocks' inputs and outputs");
  add("--heads", o.model.heads, "Attention heads");
  add("--key-dim", o.model.key_dim, "Key width of a head");
  add("--value-dim", o.model.value_dim, "Value width of a head");
  add("--hidden", o.model.hidden, "Width inside the feed-forward layer");
  add("--kernel-length", o.model.kernel_length, "Bytes that the long convolution looks back");
  add("--batch", o.training.batch, "Windows per step");
  add("--context", o.training.context, "Bytes per window");
  add("--learning-rate", o.training.learning_rate, "Highest learning rate");
  add("--warm-up", o.training.warm_up, "Share of the run in which the learning rate climbs");
  add("--last-fraction", o.training.last_fraction, "Learning rate at the end over the highest");
  add("--weight-decay", o.training.weight_decay, "Decoupled weight decay of matrices");
  add("--largest-norm", o.training.largest_norm, "Gradients of a larger norm are scaled down to it");
  add("--seed", o.training.seed, "Decides the first parameters and the windows");
  return flags;
}

int train_command(const Options& o, bool steps_given, bool seconds_given) {
  const chela::DefaultExecutor executor = executor_for(o.threads);
  const Bytes text = text_of(o);
  const SplitText split = split_text(text);
  if (!o.resume && !o.overwrite && std::filesystem::exists(o.checkpoint))
    throw Error(o.checkpoint + ": exists; go on with it by --resume, or replace it by --overwrite");
  Run run = o.resume ? load(o.checkpoint, Contents::all, executor) : new_run(o.model, o.training, executor);
  Checkpoint& c = run.checkpoint;
  if (o.resume) {
    if (steps_given) c.training.steps = o.training.steps, c.training.seconds = 0;
    if (seconds_given) c.training.seconds = o.training.seconds;
    check(c.training);
    if (c.text != fingerprint(text)) std::fputs("chela_lm: note: this run began on another text\n", stderr);
  }
  c.text = fingerprint(text);
  require_writable(o.checkpoint);
  const TrainingResult result = train(run, split, o.checkpoint, o.save_seconds, executor);
  if (result.interrupted) {
    std::fprintf(stderr, "chela_lm: stopped after step %ld; go on with: chela_lm train --resume --checkpoint %s%s\n",
                 long(c.step), o.checkpoint.c_str(), o.text.empty() ? "" : (" --text " + o.text).c_str());
    return Interrupt::exit_code;
  }
  const double held_out =
      bits_per_byte(*run.model, c.parameters.data(), split.held_out, c.training.context, c.training.batch);
  print_line(
      format("RESULT train_seconds=%.1f tokens_per_second=%.0f steps=%ld parameters=%ld "
             "training_bits_per_byte=%.4f heldout_bits_per_byte=%.4f",
             result.seconds, result.tokens_per_second, long(c.step), long(run.model->count()), result.training_bits,
             held_out));
  return 0;
}

int eval_command(const Options& o) {
  const chela::DefaultExecutor executor = executor_for(o.threads);
  const Run run = load(o.checkpoint, Contents::parameters_only, executor);
  const Checkpoint& c = run.checkpoint;
  Bytes text = text_of(o);
  if (o.part != "all") {
    SplitText split = split_text(text);
    text = std::move(o.part == "training" ? split.training : split.held_out);
  }
  const Timer timer;
  const double bits = o.stateful
                          ? stateful_bits_per_byte(*run.model, c.parameters.data(), text)
                          : bits_per_byte(*run.model, c.parameters.data(), text, c.training.context, c.training.batch);
  print_line(format("RESULT bits_per_byte=%.4f bytes=%zu part=%s stateful=%d seconds=%.1f", bits, text.size(),
                    o.part.c_str(), int(o.stateful), timer.seconds()));
  return 0;
}

int generate_command(const Options& o) {
  if (o.generation.prompt.empty()) throw Error("--prompt must not be empty");
  const Run run = load(o.checkpoint, Contents::parameters_only, executor_for(o.threads));
  const double rate = generate(*run.model, run.checkpoint.parameters.data(), o.generation);
  std::fprintf(stderr, "\nRESULT bytes=%ld bytes_per_second=%.0f\n", long(o.generation.bytes), rate);
  return 0;
}

int run(int count, char** arguments) {
  Options o;
  CLI::App app("A byte-level language model of CHELA blocks", "chela_lm");
  app.require_subcommand(1);
  app.failure_message([](const CLI::App*, const CLI::Error& error) {
    return std::string("chela_lm: ") + error.what() + " (see --help)\n";
  });

  CLI::App* train = app.add_subcommand("train", "Train a model and keep it in a checkpoint");
  add_common(*train, o);
  add_text(*train, o);
  CLI::Option* resume = train->add_flag("--resume", o.resume, "Go on with the checkpoint, under the settings it holds");
  train->add_flag("--overwrite", o.overwrite, "Replace the checkpoint if there is one")->excludes(resume);
  CLI::Option* steps = train->add_option("--steps", o.training.steps, "Length of the run")->capture_default_str();
  CLI::Option* seconds =
      train->add_option("--seconds", o.training.seconds, "Length of the run in time, in place of steps");
  train->add_option("--save-seconds", o.save_seconds, "Time between two saves")->capture_default_str();
  for (CLI::Option* flag : add_settings(*train, o)) flag->excludes(resume);

  CLI::App* eval = app.add_subcommand("eval", "Measure a checkpoint in bits per byte");
  add_common(*eval, o);
  add_text(*eval, o);
  eval->add_option("--part", o.part, "Which bytes of the text: held-out, training or all")
      ->check(CLI::IsMember({"held-out", "training", "all"}))
      ->capture_default_str();
  eval->add_flag(
      "--stateful", o.stateful,
      "Predict each byte from all before it, step by step; otherwise windows of the model's context overlap by half "
      "and each byte counts where it has more to look back on");

  CLI::App* generate = app.add_subcommand("generate", "Write with a checkpoint to standard output");
  CLI::App* demo = app.add_subcommand("demo", "Train for a while, compare with counted baselines, write a sample");
  add_common(*generate, o);
  generate->add_option("--prompt", o.generation.prompt, "Text to go on from; a line break by default");
  for (CLI::App* writes : {generate, demo}) {
    writes->add_option("--bytes", o.generation.bytes, "Bytes to write")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    writes->add_option("--temperature", o.generation.temperature, "Divides the logits; 0 takes the likeliest byte")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
  }
  generate->add_option("--seed", o.generation.seed, "Decides what is drawn")->capture_default_str();

  add_common(*demo, o);
  add_text(*demo, o);
  double demo_seconds = 140;
  demo->add_option("--seconds", demo_seconds, "Time to train")->check(CLI::PositiveNumber)->capture_default_str();
  add_settings(*demo, o);

  try {
    app.parse(count, arguments);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (*train) return train_command(o, steps->count() > 0, seconds->count() > 0);
  if (*eval) return eval_command(o);
  if (*generate) return generate_command(o);
  o.training.seconds = demo_seconds;
  if (demo->count("--checkpoint") == 0) o.checkpoint = "chela_lm_demo.safetensors";
  return demonstrate(o.model, o.training, text_of(o), o.checkpoint, o.generation, executor_for(o.threads));
}

}  // namespace

int main(int count, char** arguments) {
  Interrupt::listen();
  try {
    return run(count, arguments);
  } catch (const Interrupted&) {
    return Interrupt::exit_code;
  } catch (const std::bad_alloc&) {
    std::fputs("chela_lm: out of memory\n", stderr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "chela_lm: %s\n", error.what());
  }
  return 1;
}
