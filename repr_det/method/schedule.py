"""When the sub-network trains (RePr, algorithm 1)."""

from dataclasses import dataclass

from repr_det.method.errors import OptionError
from repr_det.method.options import about_option, check_count

DECAYED = 0.5  # a learning rate that has fallen to this share has decayed


@dataclass(frozen=True)
class RePrSchedule:
    """N cycles of S1 iterations with the full network and S2 with the sub-network, after ``start_iter`` plain ones.

    Iterations count from 0. A drop ends the last of S1, a restore the last of S2.

    Raises:
        OptionError: a number is no integer or too small.
    """

    s1_iters: int
    s2_iters: int
    num_cycles: int
    start_iter: int = 0

    def __post_init__(self) -> None:
        for name in ("s1_iters", "s2_iters", "num_cycles"):  # the options may be 0: derived
            check_count(name, getattr(self, name))
        about_option("start_iter").check("start_iter", self.start_iter)

    @classmethod
    def derive(cls, max_iter: int, first_lr_step: int | None, num_cycles: int, start_iter: int = 0) -> "RePrSchedule":
        """S1 : S2 = 2 : 1 in three quarters of the iterations before the learning rate first decays (else of all):
        10000 / 5000 for N = 3 and a first decay at 60000."""
        horizon = max_iter if first_lr_step is None else min(first_lr_step, max_iter)
        check_count("num_cycles", num_cycles)
        cycle = (horizon * 3 // 4 - start_iter) // num_cycles
        if cycle < 3:
            raise OptionError(
                f"{{num_cycles}} {num_cycles} cycles of S1 and S2 do not fit between {{start_iter}} {start_iter} and "
                f"{horizon * 3 // 4}, three quarters of the {horizon} iterations before the learning rate decays: "
                "train longer, take fewer cycles, or set {s1_iters} and {s2_iters}"
            )
        return cls(2 * (cycle // 3), cycle // 3, num_cycles, start_iter)

    @property
    def drop_iters(self) -> tuple[int, ...]:
        """Iterations that end with a drop."""
        cycle = self.s1_iters + self.s2_iters
        return tuple(self.start_iter + c * cycle + self.s1_iters - 1 for c in range(self.num_cycles))

    @property
    def restore_iters(self) -> tuple[int, ...]:
        """Iterations that end with a restore."""
        return tuple(i + self.s2_iters for i in self.drop_iters)

    @property
    def end_iter(self) -> int:
        """The first iteration after the last cycle."""
        return self.restore_iters[-1] + 1

    def phase(self, iteration: int) -> str:
        """ "full" or "sub": the network that the forward pass of ``iteration`` sees."""
        cycles = zip(self.drop_iters, self.restore_iters, strict=True)
        return "sub" if any(drop < iteration <= restore for drop, restore in cycles) else "full"

    def cycle(self, iteration: int) -> int:
        """Index of the cycle of ``iteration``: 0 before the first, N after the last."""
        return sum(restore < iteration for restore in self.restore_iters)

    def check_fits(self, max_iter: int) -> None:
        """Raises OptionError unless an iteration of the full network follows the last restore."""
        if self.end_iter >= max_iter:
            raise OptionError(
                f"RePr needs {{start_iter}} {self.start_iter} + {{num_cycles}} {self.num_cycles} x ({{s1_iters}} "
                f"{self.s1_iters} + {{s2_iters}} {self.s2_iters}) = {self.end_iter} iterations and then some of the "
                f"full network, but {{total_steps}} is {max_iter}: train longer or shorten the schedule"
            )
