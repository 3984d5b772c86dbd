/* Runs an encoder that was saved as an .sgx file: which channels an image computes, its gates
 * decide.
 *
 * All numbers are in this machine's memory; images are float32, normalised as in training, and of
 * any size from gated_smallest_image on. Nothing here throws, prints or keeps what it is given.
 */

#ifndef GATED_H
#define GATED_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Libraries for several instruction sets may be loaded at once, and must not share code: all else
 * is hidden (-fvisibility=hidden). */
#define GATED_EXPORT __attribute__((visibility("default")))

typedef struct gated_engine gated_engine;

/* Opens the bytes of an .sgx file, which may go away afterwards. Null if they are no network for
 * this library, or if there is not enough memory; then the message says why, in one sentence, cut
 * to so many bytes with the null at its end. */
GATED_EXPORT gated_engine* gated_open(const void* bytes, int64_t size, char* message,
                                      int64_t message_size);

/* Another engine with the same weights, which are held once: for a process that was forked while
 * another thread may have used the first one. Null if there is not enough memory. */
GATED_EXPORT gated_engine* gated_share(const gated_engine* engine);

GATED_EXPORT void gated_close(gated_engine* engine);

/* Size of the weights in memory. */
GATED_EXPORT int64_t gated_bytes(const gated_engine* engine);

GATED_EXPORT int64_t gated_image_channels(const gated_engine* engine);
/* Least height and width. */
GATED_EXPORT int64_t gated_smallest_image(const gated_engine* engine);
/* Length of the features of an image. */
GATED_EXPORT int64_t gated_features(const gated_engine* engine);
/* Length of an image's mask: all channels that gates choose from, or would on the gated path. */
GATED_EXPORT int64_t gated_channels(const gated_engine* engine);
/* 0 on the dense path. */
GATED_EXPORT int64_t gated_gates(const gated_engine* engine);
GATED_EXPORT int64_t gated_stages(const gated_engine* engine);

/* The outputs of the stages for an image of this size: channels, rows and columns of each. */
GATED_EXPORT void gated_map_shapes(const gated_engine* engine, int64_t height, int64_t width,
                                   int64_t* shapes);

/* Sets the dial: the threshold of the gates' logits, for gates that have one, and the budget, for
 * gates that are told one. NaN is what was saved, as both are at first. Not while the engine is run.
 * Returns 0, or 1 if there is not enough memory, or 2 for a budget outside of the range that the
 * network was trained for, or any for gates that are told none; then the dial stays. */
GATED_EXPORT int gated_set(gated_engine* engine, double threshold, double budget);

/* What such a setting means: a threshold for each channel, and for each gate a number of channels,
 * or -1 for those that reach their thresholds. Returns as gated_set. */
GATED_EXPORT int gated_decide(const gated_engine* engine, double threshold, double budget,
                              float* thresholds, int64_t* counts);

/* Computes images, number × channels × height × width. Several threads may do so at once.
 *
 * thresholds, counts  of gated_decide; null for what gated_set has set
 * features            number × features
 * masks               number × channels, ones for those that were computed; or null
 * maps                for each stage, its outputs, number × channels × rows × columns, or null; or
 *                     null
 * threads             at most
 *
 * Returns 0, or 1 if there is not enough memory, or 2 if images have too many pixels. */
GATED_EXPORT int gated_run(gated_engine* engine, const float* images, int64_t number,
                           int64_t height, int64_t width, const float* thresholds,
                           const int64_t* counts, float* features, uint8_t* masks,
                           float* const* maps, int64_t threads);

#ifdef __cplusplus
}
#endif

#endif
