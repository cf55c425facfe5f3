"""What a mixture is: no network, no ODE, no training."""

from cpmm_jax.mixture.hierarchy import HierarchicalMFA
from cpmm_jax.mixture.mfa import MFA

__all__ = ["MFA", "HierarchicalMFA"]
