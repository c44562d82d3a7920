#include "chela_lm/model.hpp"

#include <cmath>
#include <utility>

#include "chela/cpu/model/language_model.hpp"
#include "chela_lm/error.hpp"

namespace chela_lm {

namespace {

using Block = chela::ChelaBlock<chela::ShortLongMemory<chela::ExplicitKernel, 4>>;
using Network = chela::LanguageModel<Block>;
using Compute = chela::cpu::Compute<Network>;
using Executor = chela::DefaultExecutor;

Network::Shape shape_of(const ModelSettings& s) {
  const Index sizes[] = {s.layers, s.width, s.heads, s.key_dim, s.value_dim, s.hidden, s.kernel_length};
  for (const Index size : sizes)
    if (size < 1 || size > 65536) throw Error("sizes of the model must be 1 to 65536");
  Network::Shape shape;
  shape.vocabulary = vocabulary;
  shape.layers = s.layers;
  shape.block.width = s.width;
  shape.block.heads = s.heads;
  shape.block.key_dim = s.key_dim;
  shape.block.value_dim = s.value_dim;
  shape.block.memory.kernel.length = s.kernel_length;
  shape.block.feed_forward.hidden = s.hidden;
  shape.block.deviation = 1 / std::sqrt(double(s.width));
  require_ok(Network::check(shape), "model");
  return shape;
}

class ChelaDecoder : public Decoder {
 public:
  ChelaDecoder(const Network::Shape& shape, const float* parameters)
      : shape_(shape),
        parameters_(chela::bind_parameters<Network>(shape, parameters)),
        prepared_(Compute::prepare<float>(shape_, parameters_, chela::SerialExecutor{})),
        state_(shape_, 1) {}

  const std::array<float, vocabulary>& step(std::uint8_t byte) override {
    const Token token = byte;
    require_ok(Compute::step<float>(shape_, parameters_, prepared_, chela::contiguous(&token, 1),
                                    chela::contiguous(logits_.data(), 1, vocabulary), state_, chela::SerialExecutor{}),
               "decoding");
    return logits_;
  }

 private:
  Network::Shape shape_;
  Network::Parameters<const float> parameters_;
  Compute::Prepared<float> prepared_;
  Compute::State<float> state_;
  std::array<float, vocabulary> logits_ = {};
};

class ChelaModel : public Model {
 public:
  ChelaModel(const ModelSettings& settings, const Executor& executor)
      : shape_(shape_of(settings)), infos_(chela::describe_parameters<Network>(shape_)), executor_(executor) {}

  const std::vector<chela::ParameterInfo>& parameters() const override { return infos_; }

  double loss_and_gradients(const float* parameters, Tokens tokens, Tokens targets, float* gradients) override {
    double loss = 0;
    require_ok(
        Compute::loss_and_gradients<float>(shape_, chela::bind_parameters<Network>(shape_, parameters), tokens, targets,
                                           cache_, chela::bind_parameters<Network>(shape_, gradients), loss, executor_),
        "training");
    return loss;
  }

  double loss(const float* parameters, Tokens tokens, Tokens targets) override {
    double loss = 0;
    require_ok(Compute::loss<float>(shape_, chela::bind_parameters<Network>(shape_, parameters), tokens, targets,
                                    cache_, loss, executor_),
               "evaluation");
    return loss;
  }

  std::unique_ptr<Decoder> decoder(const float* parameters) override {
    return std::make_unique<ChelaDecoder>(shape_, parameters);
  }

 private:
  Network::Shape shape_;
  std::vector<chela::ParameterInfo> infos_;
  Compute::Cache<float> cache_;
  Executor executor_;
};

}  // namespace

Index Model::count() const {
  const auto& infos = parameters();
  return infos.empty() ? 0 : infos.back().offset + infos.back().count();
}

std::unique_ptr<Model> make_model(const ModelSettings& settings, const Executor& executor) {
  return std::make_unique<ChelaModel>(settings, executor);
}

}  // namespace chela_lm
