// Prints the features of one image.
//
//     example ENCODER.sgx IMAGE.ppm [THRESHOLD [BUDGET]]
//     example ENCODER.sgx IMAGE.raw HEIGHT WIDTH [THRESHOLD [BUDGET]]
//
// A PPM image (P6, 8 bits) is normalised as in training; it is not resized. A raw one is float32,
// channels × height × width, and normalised already.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "gated.h"

namespace {

constexpr float kMean[] = {@MEAN@};
constexpr float kStd[] = {@STD@};

struct Image {
  int64_t height, width;
  std::vector<float> pixels;  // channels × height × width
};

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// A number of a PPM's head, after spaces and comments.
int64_t number(std::istream& from) {
  while (from >> std::ws && from.peek() == '#') {
    std::string comment;
    std::getline(from, comment);
  }
  int64_t value = 0;
  from >> value;
  return value;
}

Image ppm(const std::string& path) {
  std::istringstream from(content(path));
  std::string kind;
  from >> kind;
  Image image;
  image.width = number(from);
  image.height = number(from);
  const int64_t most = number(from);
  from.get();
  constexpr int64_t kMostPixels = 1 << 28;
  if (kind != "P6" || most != 255 || image.width <= 0 || image.height <= 0 ||
      image.width > kMostPixels / image.height) {
    throw std::runtime_error(path + ": expected a PPM image, P6 of 8 bits");
  }
  const int64_t area = image.height * image.width;
  std::vector<unsigned char> bytes(3 * area);
  if (!from.read(reinterpret_cast<char*>(bytes.data()), bytes.size())) {
    throw std::runtime_error(path + ": ends too early");
  }
  image.pixels.resize(3 * area);
  for (int64_t i = 0; i < 3 * area; ++i) {
    const int64_t c = i % 3;
    image.pixels[c * area + i / 3] = (bytes[i] / 255.0f - kMean[c]) / kStd[c];
  }
  return image;
}

Image raw(const std::string& path, int64_t channels, const char* height, const char* width) {
  Image image{std::atoll(height), std::atoll(width), {}};
  const std::string bytes = content(path);
  image.pixels.resize(bytes.size() / sizeof(float));
  std::copy(bytes.begin(), bytes.begin() + image.pixels.size() * sizeof(float),
            reinterpret_cast<char*>(image.pixels.data()));
  const int64_t size = image.pixels.size();
  if (image.height <= 0 || image.width <= 0 || size / channels / image.height != image.width ||
      size != channels * image.height * image.width) {
    throw std::runtime_error(path + ": expected channels × height × width float32 numbers");
  }
  return image;
}

double decimal(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw std::runtime_error(text + ": expected a number");
  return value;
}

int run(const std::vector<std::string>& arguments) {
  if (arguments.size() < 2) throw std::runtime_error("expected ENCODER.sgx IMAGE.ppm");
  const std::string bytes = content(arguments[0]);
  char message[1000];
  gated_engine* engine = gated_open(bytes.data(), bytes.size(), message, sizeof message);
  if (engine == nullptr) throw std::runtime_error(arguments[0] + ": " + message);

  const int64_t channels = gated_image_channels(engine);
  const std::string& path = arguments[1];
  const bool is_ppm = path.size() > 4 && path.substr(path.size() - 4) == ".ppm";
  size_t next = is_ppm ? 2 : 4;
  if (arguments.size() < next) throw std::runtime_error("expected IMAGE.raw HEIGHT WIDTH");
  const Image image =
      is_ppm ? ppm(path) : raw(path, channels, arguments[2].c_str(), arguments[3].c_str());
  const int64_t least = gated_smallest_image(engine);
  if ((is_ppm && channels != 3) || image.height < least || image.width < least) {
    throw std::runtime_error(path + ": the encoder needs other images");
  }
  if (arguments.size() > next) {
    const double threshold = decimal(arguments[next]);
    const double budget =
        arguments.size() > next + 1 ? decimal(arguments[next + 1]) : std::nan("");  // as saved
    if (gated_set(engine, threshold, budget) != 0) {
      throw std::runtime_error("the encoder's gates cannot be told this budget");
    }
  }

  std::vector<float> features(gated_features(engine));
  std::vector<uint8_t> mask(gated_channels(engine));
  const int failed = gated_run(engine, image.pixels.data(), 1, image.height, image.width, nullptr,
                               nullptr, features.data(), mask.data(), nullptr, 1);
  gated_close(engine);
  if (failed != 0) throw std::runtime_error(path + ": the image is too large");
  int64_t computed = 0;
  for (const uint8_t one : mask) computed += one;
  std::fprintf(stderr, "%lld of %lld channels computed\n", static_cast<long long>(computed),
               static_cast<long long>(mask.size()));
  for (const float feature : features) std::printf("%.9g\n", feature);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
