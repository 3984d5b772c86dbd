"""SEED: a student that finds a queue of embeddings as similar as its teacher does."""

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ..distributed import of_all_processes
from ..losses import similarity_loss
from .student import StudentMethod


class SEED(StudentMethod):
    """`losses.similarity_loss` with a queue of the teacher's latest embeddings (Fang et al., ICLR 2021).

    The teacher keeps the head of its own pre-training, where its file has one; the student's is Linear(f,
    f)–ReLU–Linear(f, D). The queue is random at first, is compared with before the batch enters it, and is
    that of all processes (`seed/builder.py` of jacobswan1/SEED; small patches are not there).

    `method_kwargs`, besides those of `StudentMethod`:

        queue_size              K, a multiple of the images of a step of all processes; 65,536. A port to
                                CIFAR (megvii-research/US3L-CVPR2023) has 32,768. It takes K · D numbers
        student_temperature     τ_S; 0.2, as in the code. That port has 0.5
        teacher_temperature     τ_T; 10⁻⁴, as in the code and in that port

    The defaults are those of the authors' code; whether the paper's text has others was not checked.
    """

    loss_name = "train_seed_loss"
    defaults = {
        **StudentMethod.defaults,
        "queue_size": 65536,
        "student_temperature": 0.2,
        "teacher_temperature": 1e-4,
    }
    queue: Tensor
    queue_place: Tensor

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        kwargs = cfg.method_kwargs
        self._temperatures = (kwargs.student_temperature, kwargs.teacher_temperature)
        fresh = torch.randn(kwargs.queue_size, self.embedding_size)
        self.register_buffer("queue", F.normalize(fresh))
        self.register_buffer("queue_place", torch.zeros((), dtype=torch.int64))
        # The same on every process by itself; DistributedDataParallel would send it in every step.
        self._ddp_params_and_buffers_to_ignore = ["queue", "queue_place"]

    def make_head(self, features: int, size: int) -> nn.Sequential:
        """As in the class's docstring."""
        return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, size))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`losses.similarity_loss` with the queue as it was; then the teacher's embeddings enter it."""
        loss = similarity_loss(student, teacher, self.queue, *self._temperatures)
        self._enqueue(F.normalize(teacher.to(self.queue.dtype)))
        return loss

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor) -> None:
        """The oldest ones make place; without waiting for a GPU."""
        new = of_all_processes(embeddings)
        places = (self.queue_place + torch.arange(len(new), device=new.device)) % len(self.queue)
        self.queue = self.queue.index_copy(0, places, new)  # a copy: backward needs the other
        self.queue_place.add_(len(new)).remainder_(len(self.queue))
