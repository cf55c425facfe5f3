"""What a model gives when it is read at pseudotimes."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Int

from cpmm_jax.mixture.hierarchy import HierarchicalMFA


class Reading(NamedTuple):
    """A mixture and how it was obtained.

    Attributes:
        mixture: the components at the pseudotimes.
        num_steps: steps that the ODE solver took (0 where there is no ODE).
        result: 0 for success, otherwise a code that `dynamics.solve.check_result` explains.
    """

    mixture: HierarchicalMFA
    num_steps: Int[Array, ""]
    result: Int[Array, ""]

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the mixture can be used."""
        return self.result == 0
