"""What mask learning minimizes: equation 11 of arXiv 2508.17434."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

TASK_WEIGHT, DISTILLATION_WEIGHT = 1.0, 1.0


def mask_loss(
    task: Tensor,
    student: Tensor,
    teacher: Tensor,
    *,
    task_weight: float = TASK_WEIGHT,
    distillation_weight: float = DISTILLATION_WEIGHT,
) -> Tensor:
    """Task loss plus L1 distance of the student network's output from the teacher's.

    `task` [] is the perceptual loss of the decoded image; student and teacher are what both networks predict for the
    same latent, of one shape. The teacher gets no gradient. Raises ValueError if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}")
    return task_weight * task + distillation_weight * F.l1_loss(student, teacher.detach())
