"""The config group `gating`, checked."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..backbones import checked_path
from ..budgets import RANGE, BudgetSchedule, Range, is_range
from ..checkpoints.reading import trained_paths
from ..checks import (
    at_least,
    is_not_negative,
    is_positive,
    is_share,
    one_of,
    require,
    shown,
    true_or_false,
)
from ..errors import InputError
from ..flops import GRADIENTS
from ..gates import BaseGate, ConvolutionGate, check_gate_kwargs, gate_class

MOMENTUM_PATHS = ("dense", "gated", "same")
TRAINED = ("all", "gates")


@dataclass(frozen=True)
class GatingConfig:
    """What the gates aim at and how hard they are pushed.

    Attributes:
        target_budget: t_d, the share of the dense FLOPs that the gated path should use, in (0, 1];
            or a range of two, of which each step draws one and tells it to the gates.
        sparsity_weight: λ of the budget loss.
        bound_weight: γ of the bound loss; 0 switches it off.
        bound_decay: decay of the bound loss, per epoch.
        bound_gradient: the channels that the bound loss's gradient reaches: "selected", as published,
            or "all", see `flops.selected_channels`.
        bound_target: s*, the share of channels around which the bound loss starts: "sqrt" for
            √t_d, as published, "budget" for t_d, or a number in (0, 1].
        gate: the kind of gates, one of `gates.GATES`.
        gate_kwargs: arguments of the kind's own.
        reduction: r, the gates' reduction rate, for kinds that have one.
        temperature: τ of the sampled masks, for kinds that have one.
        weight_decay: of every parameter of the gates, BatchNorms included; 0 as published.
        separate_bn: whether the gated path has its own BatchNorms. Default: if a view is dense.
        warmup_epochs: epochs at the start in which every view is dense and the gates rest.
        views: the path of each view, "gated" or "dense". Default: the method's.
        distillation_weight: w of the regression of a third, gated pass to the dense features of the
            same view, in methods that have one (`*_distilled`); None elsewhere. Default there: 10.
        distillation_images: the share of each batch that takes the third pass; None as before.
            Default there: 1.
        train: "all", or "gates" for gates and gated BatchNorms alone, of an encoder that exists
            (`pretrained`): every weight and statistic of the dense path stays as it is.
        momentum_path: that of a momentum method's teacher: "dense", "gated", or "same" for that of
            the student's view with the same images. A config names it where it is not dense.
        budget_anneal: over this share of the run's epochs, once the gates are switched on, the
            lower end of the range falls to its value from the upper end; the budget, where it is a
            number, from 1.
        budget_hold: the share of the run's epochs before that, in which it stays at the upper end, or 1.
        budget_per_image: whether of a range each image of a step draws, not each step.
        budget_embedding: whether the gates are told the budget of a range. Without it the network
            cannot be set to a budget later; its threshold can.
        relative_budget_loss: whether λ is divided by the budget, so that small budgets of a range are
            kept, too. With λ alone gates exceed them where that serves the other losses.

    The last five, the distillation's and `train` are not of the two papers; a config with a number for
    a budget that leaves the last five at their defaults does not name them.
    """

    target_budget: float | Range = 0.5
    sparsity_weight: float = 5.0
    bound_weight: float = 1.0
    bound_decay: float = 0.02
    bound_target: float | str = "sqrt"
    bound_gradient: str = "selected"
    gate: str = "channel"
    gate_kwargs: dict[str, Any] = field(default_factory=dict)
    reduction: int = 4
    temperature: float = 2 / 3
    weight_decay: float = 0.0
    separate_bn: bool | None = None
    warmup_epochs: int = 0
    views: tuple[str, ...] = field(default=())
    distillation_weight: float | None = None
    distillation_images: float | None = None
    train: str = "all"
    momentum_path: str = "dense"
    budget_anneal: float = 0.0
    budget_hold: float = 0.0
    budget_per_image: bool = False
    budget_embedding: bool = True
    relative_budget_loss: bool = False

    @classmethod
    def from_config(
        cls,
        cfg: DictConfig,
        default_views: tuple[str, ...],
        regresses: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> "GatingConfig":
        """Read and check `cfg.gating`, and write the complete group back into the config.

        Args:
            cfg: a whole config; `data.num_large_crops` and `num_small_crops` say how many views
                there are.
            default_views: the method's views, where the config names none.
            regresses: as in `GatedMethod`.
            defaults: other values than the class's, where the config names none.

        Raises:
            InputError: naming the key, what was found and what is accepted.
        """
        group = OmegaConf.select(cfg, "gating", default=None)
        given: Any = {} if group is None else group
        if OmegaConf.is_config(given):
            given = OmegaConf.to_container(given, resolve=True)
        if not isinstance(given, dict):
            raise InputError(f"gating: got {given!r}, expected a group with {_KEYS}")
        for key, (default, _) in _RETIRED.items():
            if given.get(key) == default and type(given[key]) is type(default):
                del given[key]
        for key in given:
            check_key(key)
        given = {key: value for key, value in given.items() if value is not None}
        given = {**(defaults or {}), **given}
        views = given.pop("views", default_views)
        if isinstance(views, str) or not isinstance(views, (list, tuple)):
            raise InputError(f"gating.views: got {views!r}, expected a list like [gated, dense]")
        views = tuple(checked_path(view, "gating.views") for view in views)
        given.setdefault("separate_bn", "dense" in views)
        if is_range(given.get("target_budget")):
            given["target_budget"] = tuple(given["target_budget"])
        if regresses:
            given = {"distillation_weight": 10.0, "distillation_images": 1.0, **given}
        gating = cls(**given, views=views)
        gating._check_distillation(cfg, regresses)
        gating._check(cfg)
        gating._check_backbone(cfg)
        cfg.gating = gating._written()
        return gating

    def _written(self) -> dict[str, Any]:
        """As the config holds it: as ever, where nothing is new."""
        content = {**asdict(self), "views": list(self.views)}
        for key, absent in (*((key, None) for key in _OF_DISTILLATION), ("train", "all")):
            if content[key] == absent:
                del content[key]
        if self.momentum_path == "dense":  # which methods without a teacher need not say
            del content["momentum_path"]
        if self.budget_range is None:
            for key in _UNPUBLISHED:
                if content[key] == getattr(type(self), key):
                    del content[key]
        return content

    def _check(self, cfg: DictConfig) -> None:
        require(
            "gating.target_budget",
            self.target_budget,
            lambda v: is_share(v) or is_range(v),
            f"a number in (0, 1] or {RANGE}",
        )
        for key in ("budget_anneal", "budget_hold"):
            require(
                f"gating.{key}",
                getattr(self, key),
                lambda v: is_not_negative(v) and v <= 1,
                "a number from 0 to 1",
            )
        if self.budget_hold + self.budget_anneal > 1 + 1e-9 or self.budget_hold == 1:
            raise InputError(
                f"gating.budget_hold: got {self.budget_hold} beside gating.budget_anneal="
                f"{self.budget_anneal}, expected at most 1 together, so that the budget is reached"
            )
        for key in ("budget_per_image", "budget_embedding", "relative_budget_loss"):
            true_or_false(f"gating.{key}", getattr(self, key))
        if self.budget_range and self.budget_per_image and not self.budget_embedding:
            raise InputError(
                "gating.budget_per_image: got true, expected false where "
                "gating.budget_embedding is false: gates would not know each image's budget"
            )
        for key in ("sparsity_weight", "bound_weight", "bound_decay", "weight_decay"):
            require(f"gating.{key}", getattr(self, key), is_not_negative, "a number ≥ 0")
        self._check_gate()
        self._check_train(cfg)
        one_of("gating.momentum_path", self.momentum_path, MOMENTUM_PATHS)
        if self.momentum_path == "gated" and "gated" not in self.views:
            raise InputError(
                "gating.momentum_path: got gated with no gated view in gating.views, whose students "
                "learn as in the plain method; expected dense"
            )
        one_of("gating.bound_gradient", self.bound_gradient, GRADIENTS)
        require("gating.temperature", self.temperature, is_positive, "a number > 0")
        at_least("gating.reduction", self.reduction, 1)
        at_least("gating.warmup_epochs", self.warmup_epochs, 0)
        true_or_false("gating.separate_bn", self.separate_bn)
        require(
            "gating.bound_target",
            self.bound_target,
            lambda v: v in ("sqrt", "budget") or is_share(v),
            "sqrt, budget or a number in (0, 1]",
        )
        data = cfg.get("data") or {}
        crops = (data.get("num_large_crops") or 0) + (data.get("num_small_crops") or 0)
        if crops and crops != len(self.views):
            raise InputError(
                f"gating.views: got {len(self.views)} ({', '.join(self.views)}), "
                f"augmentations make {crops} crops, and each needs its path"
            )
        if "gated" not in self.views and self.distillation_weight is None:
            raise InputError("gating.views: got no gated view, expected at least one")
        if self.separate_bn and "dense" not in self.views:
            raise InputError(
                "gating.separate_bn: got true with no dense view in gating.views, "
                "which would leave the dense path's BatchNorms untrained; expected false"
            )

    def _check_train(self, cfg: DictConfig) -> None:
        one_of("gating.train", self.train, TRAINED)
        if self.train == "all":
            return
        found = None
        if self.distillation_weight is None:
            found = f"method {cfg.get('method')!r}, expected one that is *_distilled"
        elif not self.separate_bn:
            found = "gating.separate_bn=false, expected true: shared BatchNorms would change"
        elif cfg.get("pretrained") is None:
            found = "no pretrained, expected the dense encoder's file there"
        elif self.warmup_epochs:
            found = f"gating.warmup_epochs={self.warmup_epochs}, expected 0: nothing else learns"
        if found:
            raise InputError(f"gating.train: got gates with {found}")

    def _check_distillation(self, cfg: DictConfig, regresses: bool) -> None:
        if not regresses:
            for key in _OF_DISTILLATION:
                if getattr(self, key) is not None:
                    raise InputError(
                        f"gating.{key}: got {getattr(self, key)!r}, but method "
                        f"{cfg.get('method')!r} has no third pass; expected a method *_distilled"
                    )
            return
        weight, share = self.distillation_weight, self.distillation_images
        require("gating.distillation_weight", weight, is_not_negative, "a number ≥ 0")
        require("gating.distillation_images", share, is_share, "a number in (0, 1]")
        if "gated" in self.views:
            raise InputError(
                f"gating.views: got {list(self.views)}, but method {cfg.get('method')!r} has gated "
                "passes beside its views; expected all dense"
            )

    @property
    def trained_paths(self) -> tuple[str, ...]:
        """The paths that views, and the third pass, take; dense first."""
        return trained_paths({"views": self.views, "distillation_weight": self.distillation_weight})

    def _check_gate(self) -> None:
        kind = self.kind
        if not isinstance(self.gate_kwargs, dict):
            raise InputError(
                f"gating.gate_kwargs: got {shown(self.gate_kwargs)}, expected a group of arguments"
            )
        check_gate_kwargs(self.gate, self.gate_kwargs, "gating.gate_kwargs")
        for argument, key in _SAID_ELSEWHERE.items():
            if argument in self.gate_kwargs:
                raise InputError(
                    f"gating.gate_kwargs.{argument}: got {shown(self.gate_kwargs[argument])}, expected "
                    f"gating.{key} alone"
                )
        if self.budget_range and issubclass(kind, ConvolutionGate) and not kind.needs_budget:
            raise InputError(
                f"gating.target_budget: got {list(self.budget_range)}, gates of kind {self.gate!r} are "
                "told no budget; expected a number"
            )
        if kind.needs_budget and not self.budget_embedding:
            raise InputError(
                f"gating.budget_embedding: got false, gates of kind {self.gate!r} are always told "
                "the budget; expected true"
            )

    def _check_backbone(self, cfg: DictConfig) -> None:
        """Refuse a key of the backbone's that the group decides otherwise."""
        kwargs = OmegaConf.select(cfg, "backbone.kwargs", default=None) or {}
        absent = {"gate": "channel", "gate_kwargs": {}}
        for key in (*self.backbone_kwargs, *absent, "budget_range"):
            ours = {**absent, **self.backbone_kwargs}.get(key)
            if kwargs.get(key) not in (None, ours):
                source = "target_budget" if key == "budget_range" else key
                raise InputError(
                    f"backbone.kwargs.{key}: got {shown(kwargs[key])} where the group gating says "
                    f"{ours}; expected gating.{source} alone"
                )

    @property
    def budget_range(self) -> Range | None:
        """The range of target budgets; None if there is only one."""
        return self.target_budget if isinstance(self.target_budget, tuple) else None

    def schedule(self, epochs: int) -> BudgetSchedule:
        """The target budget of each step.

        Args:
            epochs: of the whole run.
        """
        low, high = self.budget_range or (self.target_budget, self.target_budget)
        anneal, hold = (round(share * epochs) for share in (self.budget_anneal, self.budget_hold))
        return BudgetSchedule(low, high, anneal, hold)  # type: ignore[arg-type]

    @property
    def kind(self) -> type[BaseGate]:
        """The class of the gates."""
        return gate_class(self.gate, "gating.gate")

    @property
    def told(self) -> bool:
        """Whether the gates are told the budget."""
        return self.kind.needs_budget or (self.budget_range is not None and self.budget_embedding)

    def bound_share(self, budget: float) -> float:
        """s* as a number, at a step's target budget."""
        named = {"sqrt": math.sqrt(budget), "budget": budget}
        return named[self.bound_target] if isinstance(self.bound_target, str) else self.bound_target

    @property
    def backbone_kwargs(self) -> dict[str, Any]:
        """The keys that the backbone is built with."""
        kwargs = {key: getattr(self, key) for key in ("reduction", "temperature", "separate_bn")}
        if self.told:
            kwargs["budget_range"] = list(self.budget_range or (self.target_budget,) * 2)
        if self.gate != "channel":
            kwargs["gate"] = self.gate
        if self.gate_kwargs:
            kwargs["gate_kwargs"] = self.gate_kwargs
        return kwargs


# Arguments of many kinds, and the keys that decide them.
_SAID_ELSEWHERE = {"reduction": "reduction", "temperature": "temperature", "told": "target_budget"}
_OF_DISTILLATION = ("distillation_weight", "distillation_images")
_UNPUBLISHED = (
    "budget_anneal",
    "budget_hold",
    "budget_per_image",
    "budget_embedding",
    "relative_budget_loss",
)
_STUDIED = "research/ablations.py has methods that do it"
# Keys of earlier versions, with the values at which their configs record them, and what to say of
# others.
_RETIRED: dict[str, tuple[Any, str]] = {
    "open_start": (False, "expected is gating.gate_kwargs.bias=4"),
    "shuffle_views": (False, _STUDIED),
    "budget_sampling": ("uniform", _STUDIED),
}
_KEYS = ", ".join(item.name for item in fields(GatingConfig))


def as_it_was(group: Mapping[str, Any], weight_decay: float) -> dict[str, Any]:
    """A recorded group `gating` with what its absent keys meant when it was written.

    Args:
        group: of an `args.json`; until 0.1.0 without the keys `bound_gradient` and `weight_decay`,
            later with some that there are no more.
        weight_decay: the optimiser's, which was then the gates', too.
    """
    return {
        "bound_gradient": "all",
        "weight_decay": weight_decay,
        "gate": "channel",
        "gate_kwargs": {},
        **{k: v for k, v in group.items() if k not in _RETIRED or v != _RETIRED[k][0]},
    }


def check_key(key: str) -> None:
    """Refuse a key that the group `gating` does not have.

    Raises:
        InputError: naming it and those that exist.
    """
    if key in _RETIRED:
        raise InputError(f"gating.{key}: no such key, {_RETIRED[key][1]}")
    if key not in _KEYS.split(", "):
        raise InputError(f"gating.{key}: no such key, expected {_KEYS}")
