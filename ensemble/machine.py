"""What training does to the machine: memory that is kept, memory layout, and number format.

The figures behind these choices: bench/results/training_speed_notes.txt.
"""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemble import artifacts
from ensemble.backbone import Member
from ensemble.errors import ArtifactError, UnavailableError
from ensemble.recipe import Train

# bits/malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
BF16_CPU = ("amx_bf16", "avx512_bf16")  # as torch.cpu.get_capabilities() names them
BF16_GAIN = 1.1  # bf16 rounds, so it has to win clearly
TRIALS, TRIAL_IMAGES = 3, 8

Timer = Callable[[Member, str], float]
