"""From a checkpoint to the features of your images, on a small CPU.

python examples/fast_features.py trained_models/vicreg_dual/<run>/last.ckpt images.npz
"""

import sys
import time

import numpy as np

from solo_gating import deploy

# What pre-training normalised with; these are solo-learn's values for CIFAR-10.
MEAN, STD = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2470, 0.2435, 0.2616])

checkpoint, file = sys.argv[1:]
images = ((np.load(file)["images"] / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)

for path in ("dense", "gated"):
    fast = deploy.compile(checkpoint, path)
    fast.threads = 1
    fast(images[:1])
    start = time.perf_counter()
    features, masks = fast.features_and_masks(images)
    milliseconds = 1000 * (time.perf_counter() - start) / len(images)
    share = np.concatenate(masks, axis=1).mean()
    print(
        f"{path}: {milliseconds:.3f} ms per image, {share:.0%} of the channels computed",
        features.shape,
    )
