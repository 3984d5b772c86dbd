"""SimReg: a student whose features, behind a deep head, regress to a teacher's."""

from torch import Tensor, nn

from ..losses import regression_loss
from .student import StudentMethod


class SimReg(StudentMethod):
    """mean (2 − 2·cos(head(student(x)), teacher(x))), of one view (Navaneet et al., BMVC 2021).

    The head, thrown away after training, has four linear layers, f → 2f → f → 2f → D; BatchNorm and
    ReLU follow the first and the third only (`mlp_arch.py` of UCDvision/simreg, n_mlp_layers=4). D is
    that of the teacher's pooled features: `teacher_head` is false unless it is set, as in the original
    without --teacher_fc.
    """

    loss_name = "train_simreg_loss"
    defaults = {**StudentMethod.defaults, "teacher_head": False}

    def make_head(self, features: int, size: int) -> nn.Sequential:
        """As in the class's docstring."""
        twice = 2 * features
        return nn.Sequential(
            *(nn.Linear(features, twice), nn.BatchNorm1d(twice), nn.ReLU(inplace=True)),
            nn.Linear(twice, features),
            *(nn.Linear(features, twice), nn.BatchNorm1d(twice), nn.ReLU(inplace=True)),
            nn.Linear(twice, size),
        )

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`losses.regression_loss`."""
        return regression_loss(student, teacher)
