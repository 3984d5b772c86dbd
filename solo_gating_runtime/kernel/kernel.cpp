// The C interface (gated.h) of one engine: which one, the compiler's flags say.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "file.h"
#include "gated.h"
#include "gates.h"
#include "network.h"
#include "runner.h"

#if defined(GATED_INT8) || defined(GATED_NATIVE_BFLOAT16)
#include "packed/engine.h"
#else
#include "float32/engine.h"
#endif

namespace gated {
namespace {

#if defined(GATED_INT8)
constexpr Type kType = Type::kInt8;
#elif defined(GATED_BFLOAT16)
constexpr Type kType = Type::kBfloat16;
#else
constexpr Type kType = Type::kFloat32;
#endif

constexpr const char* kNames[] = {"float32", "bfloat16", "int8"};

const char* name(Type type) { return kNames[static_cast<int64_t>(type)]; }

// A network's weights, packed, and what its dial's settings mean.
struct Weights {
  explicit Weights(const Network& net) : dial(net), engine(net) {}

  Dial dial;
  Engine engine;
};

std::shared_ptr<const Weights> read(const void* bytes, int64_t size) {
  Reader reader(static_cast<const char*>(bytes), size);
  const Network net = reader.network();
  if (net.type != kType) {
    throw FileError(std::string("got weights in ") + name(net.type) + ", expected " + name(kType) +
                    " for this library");
  }
  return std::make_shared<const Weights>(net);
}

void say(const char* message, char* to, int64_t size) {
  if (to == nullptr || size <= 0) return;
  const int64_t length = std::min<int64_t>(std::strlen(message), size - 1);
  std::memcpy(to, message, length);
  to[length] = '\0';
}

}  // namespace
}  // namespace gated

struct gated_engine {
  explicit gated_engine(std::shared_ptr<const gated::Weights> given)
      : weights(std::move(given)), runner({weights, &weights->engine}) {
    set(shape().threshold, shape().budget);
  }

  const gated::Network& shape() const { return weights->engine.shape(); }

  void set(double threshold, double budget) {
    thresholds.resize(shape().channels());
    counts.resize(weights->dial.gates());
    weights->dial.decide(threshold, budget, thresholds.data(), counts.data());
  }

  std::shared_ptr<const gated::Weights> weights;
  gated::Runner<gated::Engine> runner;
  std::vector<float> thresholds;
  std::vector<int64_t> counts;
};

// No exception may leave these functions: their caller is not C++.
extern "C" {

gated_engine* gated_open(const void* bytes, int64_t size, char* message, int64_t message_size) {
  try {
    std::vector<uint64_t> aligned;
    if (reinterpret_cast<uintptr_t>(bytes) % gated::kWord != 0) {
      aligned.resize(gated::ceil_div(size, gated::kWord));
      bytes = std::memcpy(aligned.data(), bytes, size);
    }
    return new gated_engine(gated::read(bytes, size));
  } catch (const std::bad_alloc&) {
    gated::say("there is not enough memory for the network", message, message_size);
  } catch (const std::exception& error) {
    gated::say(error.what(), message, message_size);
  }
  return nullptr;
}

gated_engine* gated_share(const gated_engine* engine) {
  try {
    return new gated_engine(engine->weights);
  } catch (...) {
    return nullptr;
  }
}

void gated_close(gated_engine* engine) { delete engine; }

int64_t gated_bytes(const gated_engine* engine) { return engine->weights->engine.size(); }

int64_t gated_image_channels(const gated_engine* engine) {
  return engine->shape().stem.in_channels;
}

int64_t gated_smallest_image(const gated_engine* engine) {
  return engine->shape().smallest_image();
}

int64_t gated_features(const gated_engine* engine) { return engine->shape().features; }

int64_t gated_channels(const gated_engine* engine) { return engine->shape().channels(); }

int64_t gated_gates(const gated_engine* engine) { return engine->weights->dial.gates(); }

int64_t gated_stages(const gated_engine* engine) { return engine->shape().stages.size(); }

void gated_map_shapes(const gated_engine* engine, int64_t height, int64_t width, int64_t* shapes) {
  for (const gated::MapShape& map : engine->shape().maps(height, width)) {
    *shapes++ = map.channels;
    *shapes++ = map.height;
    *shapes++ = map.width;
  }
}

int gated_set(gated_engine* engine, double threshold, double budget) {
  if (std::isnan(threshold)) threshold = engine->shape().threshold;
  if (std::isnan(budget)) budget = engine->shape().budget;
  if (!engine->shape().can_be_told(budget)) return 2;
  try {
    engine->set(threshold, budget);
    return 0;
  } catch (...) {
    return 1;
  }
}

int gated_decide(const gated_engine* engine, double threshold, double budget, float* thresholds,
                 int64_t* counts) {
  try {
    engine->weights->dial.decide(threshold, budget, thresholds, counts);
    return 0;
  } catch (...) {
    return 1;
  }
}

int gated_run(gated_engine* engine, const float* images, int64_t number, int64_t height,
              int64_t width, const float* thresholds, const int64_t* counts, float* features,
              uint8_t* masks, float* const* maps, int64_t threads) {
  try {
    gated::Decisions decisions{nullptr, nullptr};
    if (engine->weights->dial.gates() > 0) {
      decisions = {thresholds == nullptr ? engine->thresholds.data() : thresholds,
                   counts == nullptr ? engine->counts.data() : counts};
    }
    gated::Results results;
    results.features = features;
    results.mask = masks;
    if (maps != nullptr) std::copy_n(maps, engine->shape().stages.size(), results.maps);
    engine->runner.run(images, number, height, width, decisions, results,
                       static_cast<int>(threads));
    return 0;
  } catch (const std::length_error&) {
    return 2;
  } catch (...) {
    return 1;
  }
}
}
