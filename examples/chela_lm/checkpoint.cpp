#include "chela_lm/checkpoint.hpp"

#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "chela/model/initialize.hpp"
#include "chela/model/parameter_file.hpp"
#include "chela_lm/error.hpp"

namespace chela_lm {

namespace {

constexpr const char* metadata_key = "chela_lm";
constexpr int file_version = 1;
constexpr const char* first_prefix = "adamw.first.";
constexpr const char* second_prefix = "adamw.second.";

std::map<std::string, std::string> metadata_of(const Checkpoint& checkpoint) {
  const nlohmann::json description = {{"version", file_version},         {"model", checkpoint.model},
                                      {"training", checkpoint.training}, {"step", checkpoint.step},
                                      {"seconds", checkpoint.seconds},   {"text", checkpoint.text}};
  return {{metadata_key, description.dump()}};
}

Checkpoint described_by(const std::filesystem::path& path, const std::map<std::string, std::string>& metadata) {
  const auto found = metadata.find(metadata_key);
  if (found == metadata.end()) throw Error(path.string() + ": not a checkpoint of chela_lm");
  Checkpoint checkpoint;
  try {
    const nlohmann::json description = nlohmann::json::parse(found->second);
    if (const int version = description.at("version"); version != file_version)
      throw Error(path.string() + ": a checkpoint of version " + std::to_string(version) + ", expected " +
                  std::to_string(file_version));
    description.at("model").get_to(checkpoint.model);
    description.at("training").get_to(checkpoint.training);
    description.at("step").get_to(checkpoint.step);
    description.at("seconds").get_to(checkpoint.seconds);
    description.at("text").get_to(checkpoint.text);
    check(checkpoint.training);
  } catch (const nlohmann::json::exception& error) {
    throw Error(path.string() + ": the description of the run is damaged: " + error.what());
  }
  if (checkpoint.step < 0) throw Error(path.string() + ": the description of the run is damaged: negative step");
  return checkpoint;
}

chela::Tensor<float, 1> zeros(Index count) { return chela::Tensor<float, 1>(std::array<Index, 1>{count}); }

}  // namespace

void check(const TrainingSettings& s) {
  const auto demand = [](bool holds, const char* what) {
    if (!holds) throw Error(what);
  };
  demand(s.batch >= 1 && s.batch <= 65536, "the batch must be 1 to 65536 windows");
  demand(s.context >= 2 && s.context <= (1 << 24), "the context must be 2 to 16777216 bytes");
  demand(s.steps >= 1, "there must be at least one step");
  demand(s.seconds >= 0 && std::isfinite(s.seconds), "the time limit must not be negative");
  demand(s.learning_rate > 0 && std::isfinite(s.learning_rate), "the learning rate must be positive");
  demand(s.warm_up >= 0 && s.warm_up <= 1 && s.last_fraction >= 0 && s.last_fraction <= 1,
         "warm-up and last fraction of the learning rate must lie in [0, 1]");
  demand(s.weight_decay >= 0 && std::isfinite(s.weight_decay), "the weight decay must not be negative");
  demand(s.largest_norm > 0, "the largest norm of gradients must be positive");
}

Run new_run(const ModelSettings& model, const TrainingSettings& training, const chela::DefaultExecutor& executor) {
  check(training);
  Run run;
  run.checkpoint.model = model;
  run.checkpoint.training = training;
  run.model = make_model(model, executor);
  const Index count = run.model->count();
  run.checkpoint.parameters = zeros(count);
  run.checkpoint.first_moment = zeros(count);
  run.checkpoint.second_moment = zeros(count);
  chela::initialize_parameters(run.model->parameters(), training.seed, run.checkpoint.parameters.data());
  return run;
}

void save(const Run& run, const std::filesystem::path& path) {
  const auto& infos = run.model->parameters();
  std::vector<chela::TensorSource> sources;
  chela::append_sources(infos, "", run.checkpoint.parameters.data(), sources);
  chela::append_sources(infos, first_prefix, run.checkpoint.first_moment.data(), sources);
  chela::append_sources(infos, second_prefix, run.checkpoint.second_moment.data(), sources);
  require_ok(chela::save_safetensors(path, sources, metadata_of(run.checkpoint)));
}

void require_writable(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(path)) throw Error(path.string() + ": a folder is in the checkpoint's place");
  const chela::AtomicFile probe(path);
  require_ok(probe.status());
}

Run load(const std::filesystem::path& path, Contents contents, const chela::DefaultExecutor& executor) {
  chela::SafetensorsHeader header;
  require_ok(chela::read_safetensors_header(path, header));
  Run run;
  run.checkpoint = described_by(path, header.metadata);
  run.model = make_model(run.checkpoint.model, executor);
  const auto& infos = run.model->parameters();
  const Index count = run.model->count();
  std::vector<chela::TensorTarget> targets;
  run.checkpoint.parameters = zeros(count);
  chela::append_targets(infos, "", run.checkpoint.parameters.data(), targets);
  if (contents == Contents::all) {
    run.checkpoint.first_moment = zeros(count);
    run.checkpoint.second_moment = zeros(count);
    chela::append_targets(infos, first_prefix, run.checkpoint.first_moment.data(), targets);
    chela::append_targets(infos, second_prefix, run.checkpoint.second_moment.data(), targets);
  }
  require_ok(chela::load_safetensors(
      path, targets, contents == Contents::all ? chela::ExtraTensors::refused : chela::ExtraTensors::ignored));
  return run;
}

}  // namespace chela_lm
