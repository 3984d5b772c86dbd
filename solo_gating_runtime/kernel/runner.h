// Images of a batch go to threads: what engines have in common.

#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gates.h"
#include "network.h"
#include "team.h"

namespace gated {

// Places are kept in 32 bits.
inline void check_places(int64_t number) {
  if (number > INT32_MAX) throw std::length_error("too many pixels");
}

// Where the results of one image, or of a batch of them, go.
struct Results {
  float* features = nullptr;
  uint8_t* mask = nullptr;  // of all gates' channels; null if it is not wanted
  // The stages' outputs, channels × rows × columns; null if they are not wanted.
  float* maps[kMostStages] = {};
};

// Runs an engine, which is a network's weights and never changes:
//
//   Engine::Layout          where everything lies for images of its `height` and `width`
//   Engine::Workspace       what one image needs
//   shape()                 the network, whose pointers to weights must not be followed
//   layout(height, width)   a Layout; throws std::length_error for images that are too large
//   prepare(workspace, layout, threads)
//                           makes a workspace ready for a layout and a team of so many threads
//   forward(workspace, image, decisions, results, team)
//                           computes one image, in all threads of a team
template <class Engine>
class Runner {
 public:
  explicit Runner(std::shared_ptr<const Engine> engine) : engine_(std::move(engine)) {}

  const std::shared_ptr<const Engine>& engine() const { return engine_; }

  void run(const float* images, int64_t number, int64_t height, int64_t width, Decisions decisions,
           const Results& results, int threads) {
    const Network& net = engine_->shape();
    const int64_t image_size = net.stem.in_channels * height * width;
    const int64_t mask_size = net.channels();
    const std::vector<MapShape> shapes = net.maps(height, width);
    const auto of_image = [&](int64_t i) {
      Results one;
      one.features = results.features + i * net.features;
      if (results.mask != nullptr) one.mask = results.mask + i * mask_size;
      for (size_t s = 0; s < shapes.size(); ++s) {
        const MapShape& map = shapes[s];
        if (results.maps[s] == nullptr) continue;
        one.maps[s] = results.maps[s] + i * map.channels * map.height * map.width;
      }
      return one;
    };
    // Each thread takes whole images; what is left over, all threads compute together.
    const int64_t apart = threads == 1 ? number : number / threads * threads;
    std::vector<std::unique_ptr<Workspace>> spaces;
    for (int i = 0; i < (apart > 0 ? threads : 1); ++i) {
      spaces.push_back(borrow(height, width, i == 0 && apart < number ? threads : 1));
    }
    const auto one = [&](Workspace& w, int64_t i, Team team) {
      engine_->forward(w, images + i * image_size, decisions, of_image(i), team);
    };
    // Without a parallel region, so that a process that was forked may call this.
    if (threads == 1) {
      for (int64_t i = 0; i < number; ++i) one(*spaces[0], i, {0, 1});
    } else {
#pragma omp parallel num_threads(threads)
      {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < apart; ++i) one(*spaces[team().rank], i, {0, 1});
        for (int64_t i = apart; i < number; ++i) one(*spaces[0], i, team());
      }
    }
    for (auto& space : spaces) give_back(std::move(space));
  }

 private:
  using Workspace = typename Engine::Workspace;
  using Layout = typename Engine::Layout;

  static Team team() {
#ifdef _OPENMP
    return {omp_get_thread_num(), omp_get_num_threads()};
#else
    return {0, 1};
#endif
  }

  std::unique_ptr<Workspace> borrow(int64_t height, int64_t width, int threads) {
    std::unique_ptr<Workspace> space;
    std::shared_ptr<const Layout> layout;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        space = std::move(free_.back());
        free_.pop_back();
      }
      if (!layout_ || layout_->height != height || layout_->width != width) {
        layout_ = std::make_shared<const Layout>(engine_->layout(height, width));
      }
      layout = layout_;
    }
    if (!space) space = std::make_unique<Workspace>();
    engine_->prepare(*space, layout, threads);
    return space;
  }

  void give_back(std::unique_ptr<Workspace> space) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(space));
  }

  std::shared_ptr<const Engine> engine_;
  std::mutex mutex_;
  std::shared_ptr<const Layout> layout_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace gated
