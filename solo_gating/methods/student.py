"""What students of a frozen teacher share: one view for both, the teacher, the head, the widths."""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..backbones import BACKBONES
from ..backbones.sliced import POLICY
from ..checkpoints.teacher import load_teacher
from ..errors import InputError
from ..policies import read_policy
from ..solo_learn import BaseMethod
from .gated import first_view

TEACHER = "method_kwargs.teacher"


class StudentMethod(BaseMethod):
    """A student that learns from a frozen teacher: one view of each image, seen by both.

        total = loss(head(student(x)), teacher(x)) + classification

    (The classifier sees detached features, as in all of solo-learn's methods.) The teacher is in
    evaluation mode and without gradient. It goes where the method goes (device, dtype, memory format)
    but is no submodule: it is neither trained, nor in the optimiser, nor in checkpoints, so that to
    continue a run its file must be there.

    `method_kwargs` of all students; `load_teacher` says which files there may be:

        teacher             the teacher's file
        teacher_path        "dense" (default), or "gated" for a gated encoder's other path
        teacher_head        whether the head of the teacher's own pre-training follows; None: if the
                            file has one
        proj_output_dim     D, the size of what is compared; the teacher's, which is the default

    Raises:
        InputError: for a teacher that cannot be used, or of another size.
    """

    has_projector = False  # for `features=projector`: the head is thrown away
    loss_name = ""
    defaults: dict[str, object] = {"teacher_path": "dense", "teacher_head": None}

    def __init__(self, cfg: DictConfig):
        record_widths(cfg)
        given = {k: v for k, v in (cfg.get("method_kwargs") or {}).items() if v is not None}
        cfg.method_kwargs = {**self.defaults, **given}
        super().__init__(cfg)
        kwargs = cfg.method_kwargs
        if kwargs.get("teacher") is None:
            raise InputError(f"{TEACHER}: missing, expected the file of a frozen encoder")
        teacher = load_teacher(kwargs.teacher, kwargs.teacher_path, kwargs.teacher_head)
        self._held = (teacher,)  # of a tuple nn.Module takes no note
        size = _embedding_size(teacher, kwargs.teacher, cfg.augmentations[0].crop_size)
        if kwargs.get("proj_output_dim", size) != size:
            raise InputError(
                f"method_kwargs.proj_output_dim: got {kwargs.proj_output_dim}, expected {size}, what "
                f"{kwargs.teacher!r} gives; or no such key"
            )
        self.embedding_size = size
        self.head = self.make_head(self.features_dim, size)

    def make_head(self, features: int, size: int) -> nn.Module:
        """The head behind the student's features.

        Args:
            features: of the student.
            size: D.
        """
        raise NotImplementedError

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a step.

        Args:
            student: B × D, behind the head.
            teacher: B × D.
        """
        raise NotImplementedError

    @property
    def teacher(self) -> nn.Sequential:
        """The teacher: images B × 3 × H × W → B × D."""
        return self._held[0]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Under .to(), .double(), .cuda(), ..., whoever calls them.
        for module in self._held:
            module._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def learnable_params(self) -> list[dict[str, object]]:
        """solo-learn's groups, and the head's."""
        return [*super().learnable_params, {"name": "head", "params": self.head.parameters()}]

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        """The method's loss and the online classifier's."""
        outs = super().training_step(batch, batch_idx)
        images = first_view(batch[1])
        if not self.no_channel_last:
            images = images.to(memory_format=torch.channels_last)
        with torch.no_grad():
            of_teacher = self.teacher(images)
        of_student = self.head(outs["feats"][0])
        with torch.autocast(images.device.type, enabled=False):
            loss = self.compare(of_student, of_teacher)
        self.log(self.loss_name, loss.detach(), on_epoch=True, sync_dist=True)
        return loss + outs["loss"]


def record_widths(cfg: DictConfig) -> None:
    """Write a student's widths into its config, in place of the policy that says them.

    `backbone.kwargs.hidden` then describes the network: the checkpoint's args.json needs no policy,
    which may change or go. `backbone.policy` keeps its budget and its share of the FLOPs.

    Args:
        cfg: a whole config; others than `<resnet>_policy` stay as they are.

    Raises:
        InputError: as `backbones.resnet_of_policy`.
    """
    name, kwargs = cfg.backbone.name, cfg.backbone.get("kwargs") or {}
    file = kwargs.get("policy")
    if file is None:
        for key in ("policy", "hidden"):  # of a recipe's, for another backbone than the recipe's
            if kwargs.get(key) is None:
                kwargs.pop(key, None)
        return
    if not name.endswith("_policy"):
        raise InputError(f"{POLICY}: got {file!r}, backbone {name!r} takes none; expected null")
    with torch.device("meta"):
        net = BACKBONES[name](**kwargs)
    policy = read_policy(file, POLICY)
    told = policy.target_budget if policy.budget is None else policy.budget
    cfg.backbone.policy = {"target_budget": told, "share": policy.share}
    cfg.backbone.kwargs = {
        **{key: value for key, value in kwargs.items() if key != "policy"},
        "hidden": net.architecture["hidden"],
    }


def _embedding_size(teacher: nn.Module, file: str, side: int) -> int:
    """D, of images of the view's size."""
    try:
        with torch.no_grad():
            found = teacher(torch.zeros(1, 3, side, side))
    except Exception as error:  # whatever a network of solo-learn's says to images of another size
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{TEACHER}: {file!r} takes no images of {side}×{side} pixels ({reason})"
        ) from error
    if found.ndim != 2:
        raise InputError(f"{TEACHER}: {file!r} gives {tuple(found.shape)}, expected features B × D")
    return found.shape[1]
