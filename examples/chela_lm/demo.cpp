#include "chela_lm/demo.hpp"

#include "chela_lm/evaluation.hpp"
#include "chela_lm/interrupt.hpp"
#include "chela_lm/ngram.hpp"
#include "chela_lm/output.hpp"
#include "chela_lm/training.hpp"

namespace chela_lm {

int demonstrate(const ModelSettings& model, const TrainingSettings& training, const Bytes& text,
                const std::filesystem::path& checkpoint, const GenerationSettings& sample,
                const chela::DefaultExecutor& executor) {
  const SplitText split = split_text(text);
  Run run = new_run(model, training, executor);
  run.checkpoint.text = fingerprint(text);
  require_writable(checkpoint);
  print_line(format("%ld parameters, %zu bytes to train on, %zu held out, %.0f seconds", long(run.model->count()),
                    split.training.size(), split.held_out.size(), training.seconds));
  const TrainingResult trained = train(run, split, checkpoint, 60, executor);
  if (trained.interrupted) {
    print_line("stopped; go on with: chela_lm train --resume --checkpoint " + checkpoint.string());
    return Interrupt::exit_code;
  }

  print_line("evaluating on the held-out bytes");
  const float* parameters = run.checkpoint.parameters.data();
  const double model_bits = bits_per_byte(*run.model, parameters, split.held_out, training.context, training.batch);
  const double unigram_bits = ByteCounts(split.training, 0).bits_per_byte(split.held_out);
  const double trigram_bits = ByteCounts(split.training, 2).bits_per_byte(split.held_out);
  print_line(format("  %-34s %.3f bits per byte", "counted single bytes", unigram_bits));
  print_line(format("  %-34s %.3f bits per byte", "counted trigrams with back-off", trigram_bits));
  print_line(format("  %-34s %.3f bits per byte", "CHELA", model_bits));
  print_line(format("a sample of %ld bytes, decoded step by step:", long(sample.bytes)));
  generate(*run.model, parameters, sample);
  print_line("");
  print_line("the model is in " + checkpoint.string() + "; write more with: chela_lm generate --checkpoint " +
             checkpoint.string());
  print_line(
      format("RESULT train_seconds=%.1f tokens_per_second=%.0f heldout_bits_per_byte=%.4f "
             "trigram_bits_per_byte=%.4f unigram_bits_per_byte=%.4f",
             trained.seconds, trained.tokens_per_second, model_bits, trigram_bits, unigram_bits));
  return 0;
}

}  // namespace chela_lm
