"""Test cases, the tolerance rule for backends, and a self-test of the installation."""

from optical.testing.cases import Case, all_cases
from optical.testing.tolerance import TOLERANCE, assert_backend_correct

__all__ = ["TOLERANCE", "Case", "all_cases", "assert_backend_correct"]
