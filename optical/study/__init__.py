"""Studies: train every arm, search, evaluate and compare, from one configuration file."""

from optical.study.config import read_config
from optical.study.study import run_study

__all__ = ["read_config", "run_study"]
