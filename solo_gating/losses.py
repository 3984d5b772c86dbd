"""The losses of the gates, budget and bound, and those that compare with what another network says."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def budget_loss(
    flops_share: Tensor,
    target_budget: float | Tensor,
    weight: float = 5.0,
    relative: bool = False,
) -> Tensor:
    """λ · (F^R / F^O − t_d)² (unification paper, Eq. 3).

    Args:
        flops_share: F^R / F^O with F^R averaged over the batch, a scalar; or of each image, B.
        target_budget: t_d, in (0, 1]; or one for each image.
        weight: λ. The papers' 5 suits runs of hundreds of epochs.
        relative: λ / t_d in the place of λ. (Not published.)
    """
    loss = weight * (flops_share - target_budget) ** 2
    return loss / target_budget if relative else loss


def bound_loss(
    channel_shares: Tensor,
    bound_target: float,
    epoch: int,
    weight: float = 1.0,
    decay: float = 0.02,
) -> Tensor:
    """γ · (mean_l relu(p·s* − s_l)² + mean_l relu(s_l − (1 − p + p·s*))²), p = exp(−decay·epoch).

    Keeps every block near the target early on, and lets go as p decays (DGNet, Li et al. 2021;
    `solo/losses/regularization_channel.py` of KrishnaTarun/Unification).

    Args:
        channel_shares: s_l, the batch's mean share of selected channels in each block, length L.
            The published gradient is that of `flops.selected_channels(masks, "selected")`.
        bound_target: s*, in (0, 1]. The authors take √t_d: in DGNet the budget is the product of
            two gates, spatial and channel. Only the channel gate remains here, so that t_d
            itself would be the consistent choice.
        epoch: epochs since the gates were switched on.
        weight: γ.
        decay: of p, per epoch.
    """
    p = math.exp(-decay * epoch)
    lower = F.relu(p * bound_target - channel_shares).square().mean()
    upper = F.relu(channel_shares - (1 - p + p * bound_target)).square().mean()
    return weight * (lower + upper)


def unexplained_variance(
    features: Tensor, target: Tensor, mean: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """mean_c E(f_c − t_c)² / (Var t_c + 10⁻⁴): the share of the target's variance that is not explained.

    1 for features that are the target's mean, 0 for the target itself. (Cosine similarity would not
    do: behind a ReLU all images' features are nearly parallel.)

    Args:
        features: f, B × C.
        target: t, B × C; gets no gradient.
        mean: makes a mean over this process's batch one over all processes.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, target = features.to(dtype), target.detach().to(dtype)
    centre = mean(target.mean(0))
    variance = mean((target - centre).square().mean(0))
    error = mean((features - target).square().mean(0))
    return (error / (variance + 1e-4)).mean()


def nt_xent(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss over the 2·B projections of students and teachers of this process's images.

    Each of them tells its partner from the 2·B − 2 others, by cosine / temperature.

    Args:
        student: B × D.
        teacher: B × D, of the same images.
        temperature: T.
    """
    both = F.normalize(torch.cat([student, teacher]))
    nearness = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(nearness, torch.arange(len(both), device=both.device).roll(len(student)))


def negative_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """−cos, mean over the images; B × D and B × D, whose second gets no gradient."""
    return -F.cosine_similarity(predicted, target.detach()).mean()


def output_groups(parameter: Tensor, groups: int = 8) -> Tensor:
    """The group of each of a parameter's C output channels, from 0; C numbers.

    Kernels and vectors are cut into groups of C // `groups` channels, the last of which has the rest.
    Matrices are not: all their channels are in the first.
    """
    channels = torch.arange(len(parameter), device=parameter.device)
    group = (channels // max(1, len(parameter) // groups)).clamp(max=groups - 1)
    return (group * (parameter.dim() != 2)).to(parameter.dtype)


def group_penalty(
    parameters: Iterable[Tensor], groups: Iterable[Tensor], strength: float, slope: float
) -> Tensor:
    """Σ λ · (1 − a · i) · p², a weight decay that is gentler to channels that fewer widths have.

    US3L's (`losses/regularizers/GroupReg.py` of megvii-research/US3L-CVPR2023).

    Args:
        parameters: of one dimension or more.
        groups: i, from `output_groups` of each parameter.
        strength: λ; the gradient is that of a weight decay of 2·λ.
        slope: a.
    """
    terms = []
    for parameter, group in zip(parameters, groups, strict=True):
        squares = parameter.square()
        if parameter.dim() > 1:
            squares = squares.sum(dim=tuple(range(1, parameter.dim())))
        terms.append(torch.dot(squares, 1 - slope * group))
    return strength * torch.stack(terms).sum()


def regression_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i (2 − 2·cos(s_i, t_i)) (SimReg, Navaneet et al. 2021; `simreg.py` of UCDvision/simreg).

    Args:
        student: s, B × D.
        teacher: t, B × D; gets no gradient.
    """
    s, t = _directions(student, teacher)
    return (2 - 2 * (s * t).sum(1)).mean()


def similarity_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    student_temperature: float = 0.2,
    teacher_temperature: float = 1e-4,
) -> Tensor:
    """Cross-entropy between the teacher's similarities and the student's (SEED, Fang et al. 2021).

        p_i = softmax([t_i·t_i, t_i·q_1, ..., t_i·q_K] / τ_T)
        −mean_i Σ_k p_ik · log softmax([s_i·t_i, s_i·q_1, ..., s_i·q_K] / τ_S)_k

    all of length 1 (`seed/builder.py` and `tools/utils.py` of jacobswan1/SEED). As t_i·t_i = 1, the
    published τ_T = 10⁻⁴ leaves of p little but the first place: the loss is then InfoNCE with the
    teacher's embedding as the positive one.

    Args:
        student: s, B × D.
        teacher: t, B × D; gets no gradient.
        queue: q, K × D, teacher's embeddings of length 1 from other steps.
        student_temperature: τ_S.
        teacher_temperature: τ_T.
    """
    s, t = _directions(student, teacher)
    q = queue.to(t.dtype)
    of_teacher = torch.cat([(t * t).sum(1, keepdim=True), t @ q.T], dim=1) / teacher_temperature
    of_student = torch.cat([(s * t).sum(1, keepdim=True), s @ q.T], dim=1) / student_temperature
    return -(of_teacher.softmax(1) * of_student.log_softmax(1)).sum(1).mean()


def _directions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows of length 1, in at least float32."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return F.normalize(student.to(dtype)), F.normalize(teacher.detach().to(dtype))
