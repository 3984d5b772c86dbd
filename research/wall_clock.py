"""How long a pre-training would take on many GPUs: computed from the speed of one, not measured.

python research/wall_clock.py --images-per-second 1000 3000 10000 [--config-name NAME]

Take the speed of one GPU from `main_benchmark_train --accelerator gpu` (or that of the views, from
`main_benchmark_data`, if it is lower). docs/guide/several_gpus.md has the model; bandwidths and latencies are
assumptions, see --help.
"""

import argparse
import math
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import nn

from solo_gating.checks import is_positive, one_of, require
from solo_gating.cli import one_sentence_errors
from solo_gating.config.compose import composed, config_names
from solo_gating.config.pretraining import prepare_config
from solo_gating.training.model import build_model

IMAGES = {"ImageNet-100": 126_689, "ImageNet-1k": 1_281_167}
# VICReg's embeddings, and one backbone: what `Traffic` counts.
ACCEPTED = [n for n in config_names() if n.startswith("vicreg") and "two_encoders" not in n]
# The share of a step in which gradients may be sent: it is twice as long as the forward pass.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Links:
    """Between the GPUs of a job: bytes/s into and out of each, and seconds for a small message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Traffic:
    """What a step sends; `cfg` and the network that it builds say it.

    Attributes:
        gradients: bytes of one copy.
        calls: of synchronised BatchNorm, forward and backward, both views.
        embeddings: bytes of both views' embeddings of one image.
    """

    gradients: int
    calls: int
    embeddings: int

    @classmethod
    def of(cls, cfg: DictConfig) -> "Traffic":
        """Count it."""
        model = build_model(cfg)
        norms = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        views = cfg.gating.views if "gating" in cfg else ["dense"] * 2
        gated = list(views).count("gated")

        def passes(name: str) -> int:
            if "gated_bn" in name or ".gate." in name:
                return gated
            parent, _, own = name.rpartition(".")
            replaced = f"{parent}.gated_{own}" in norms
            return len(views) - gated if replaced else len(views)

        return cls(
            gradients=4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
            calls=2 * sum(map(passes, norms)),
            embeddings=2 * 4 * cfg.method_kwargs.proj_output_dim,
        )

    def seconds(self, gpus: int, batch: int, compute: float, links: Links) -> float:
        """Of a step with `compute` seconds of computation, what is not hidden behind it included."""
        ring = 2 * (gpus - 1) / gpus / links.bandwidth
        hidden = min(BACKWARD * compute, ring * self.gradients)
        gathered = (gpus - 1) * batch * self.embeddings / links.bandwidth
        reduced = ring * gpus * batch * self.embeddings
        small = self.calls * links.latency
        return compute + ring * self.gradients - hidden + gathered + reduced + small


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images-per-second", type=float, nargs="+", required=True)
    parser.add_argument("--config-name", default="vicreg_dual_imagenet100")
    parser.add_argument("--batch", type=int, default=64, help="images of one GPU in a step (64)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    parser.add_argument("--inside", type=float, default=200, help="GB/s, one machine (200)")
    parser.add_argument("--between", type=float, default=25, help="GB/s per GPU, several (25)")
    parser.add_argument(
        "--latency",
        type=float,
        nargs=2,
        default=[20, 50],
        help="µs, in one machine and between (20 50)",
    )
    with one_sentence_errors():
        _print_table(parser.parse_args())


def _print_table(options: argparse.Namespace) -> None:
    one_of("config-name", options.config_name, ACCEPTED)
    for key in ("images_per_second", "gpus", "latency"):
        for number in getattr(options, key):
            require(key, number, is_positive, "a number > 0")
    for key in ("batch", "gpus_per_machine", "inside", "between"):
        require(key, getattr(options, key), is_positive, "a number > 0")
    cfg = prepare_config(composed(options.config_name, ["precision=32-true"]))
    traffic, batch = Traffic.of(cfg), options.batch
    links = [
        Links(1e9 * bandwidth, 1e-6 * latency)
        for bandwidth, latency in zip(
            (options.inside, options.between), options.latency, strict=True
        )
    ]
    print(f"{traffic}, {batch} images per GPU\n")
    print(
        "| images/s of one GPU | GPUs | step, ms | of that computing | hours for 100 epochs: "
        + " | ".join(IMAGES)
        + " |"
    )
    print("|" + "---|" * (4 + len(IMAGES)))
    for rate in options.images_per_second:
        for gpus in options.gpus:
            compute = batch / rate
            step = traffic.seconds(gpus, batch, compute, links[gpus > options.gpus_per_machine])
            hours = [100 * math.ceil(n / (gpus * batch)) * step / 3600 for n in IMAGES.values()]
            cells = [f"{rate:g}", str(gpus), f"{1000 * step:.1f}", f"{compute / step:.0%}"]
            print("| " + " | ".join([*cells, *(f"{h:.2f}" for h in hours)]) + " |")


if __name__ == "__main__":
    main()
