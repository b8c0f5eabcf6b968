"""What a method cost, counted as the paper's Tables 6 and 7 count it: network evaluations, and GPU-days.

The paper states neither rule; these reproduce its rows (docs/evaluation.md shows the arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffusion2gan.errors import UserError

ROLES = ("data_teacher", "student", "target", "teacher_online")
"""Who was evaluated: the teacher for the pairs, the student being trained, a target network, the teacher during training."""

TABLE6_STUDENT = 76_800_000
"""Student evaluations behind every row of Table 6, one a training sample: the constant that all five rows share."""
TABLE6_PER_PAIR = 35
"""18 steps of Heun's method: the last needs one evaluation, the others two."""


def heun_evaluations(steps: int) -> int:
    """Network evaluations of `steps` steps of Heun's method that end at noise level 0."""
    if steps < 1:
        raise UserError(f"{steps} steps, expected at least 1")
    return 2 * steps - 1


@dataclass
class Evaluations:
    """Counts by role. Backward passes, losses, autoencoder and discriminator are not network evaluations here."""

    by_role: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))

    def add(self, role: str, count: int) -> None:
        """`count` more evaluations (samples, not batches). Raises UserError for an unknown role."""
        if role not in self.by_role:
            raise UserError(f"role {role!r}, expected one of {', '.join(ROLES)}")
        self.by_role[role] += count

    @property
    def paper(self) -> int:
        """As Table 6 counts: the teacher's for the data, the student's in training."""
        return self.by_role["data_teacher"] + self.by_role["student"]

    @property
    def all(self) -> int:
        return sum(self.by_role.values())


def table6(pairs: int) -> Evaluations:
    """The evaluations of Table 6's ODE distillation with so many pairs."""
    counted = Evaluations()
    counted.add("data_teacher", TABLE6_PER_PAIR * pairs)
    counted.add("student", TABLE6_STUDENT)
    return counted


def consistency_distillation(batch: int = 512, iterations: int = 800_000) -> Evaluations:
    """Table 6's CD row: student, target, and two evaluations of the online Heun teacher a sample.
    The paper's 819.2 M are two of these four."""
    counted = Evaluations()
    samples = batch * iterations
    for role, times in (("student", 1), ("target", 1), ("teacher_online", 2)):
        counted.add(role, times * samples)
    return counted


@dataclass(frozen=True)
class Stage:
    """A stage of a method's making: `gpus` of one kind for `hours` of wall clock."""

    name: str
    gpus: int
    hours: float
    gpu: str = "A100-80GB"


def gpu_days(stages: Sequence[Stage], include: Sequence[str] | None = None) -> float:
    """Sum of GPUs x hours / 24 over `stages`, or those named. Raises UserError for a name that is none, or mixed kinds of GPU:
    days of different GPUs are no sum."""
    chosen = [s for s in stages if include is None or s.name in include]
    if missing := sorted(set(include or ()) - {s.name for s in stages}):
        raise UserError(f"no stage {missing[0]!r}, expected some of {', '.join(s.name for s in stages)}")
    if len(kinds := sorted({s.gpu for s in chosen})) > 1:
        raise UserError(f"stages on {' and '.join(kinds)}: their days do not add up; count each kind for itself")
    return sum(s.gpus * s.hours / 24 for s in chosen)


INSTAFLOW = tuple(
    Stage(name, 1, 24 * days)
    for name, days in (("data", 16.0), ("reflow 1", 11.2), ("reflow 2", 64.0), ("distillation 1", 54.4), ("distillation 2", 53.6))
)
"""InstaFlow's A100-days by its own account; Table 7's 183.2 leaves the data out, its card's 199.2 does not."""
