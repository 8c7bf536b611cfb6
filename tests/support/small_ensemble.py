"""The ensemble of the bundle that helpers.py writes, without its files."""

import numpy as np
from helpers import PREPROCESS_CONFIG, SCALES, STACKER

from ensemble.models.runner import Runner
from export.inference.ensemble import Ensemble


def runner(name, scale):
    def run(pixels):
        return (scale * (pixels.mean(axis=(1, 2, 3), dtype=np.float64) / 255 - 0.5)).astype(np.float32)

    return Runner(name, PREPROCESS_CONFIG, run)


ENSEMBLE = Ensemble(tuple(runner(name, scale) for name, scale in SCALES.items()), STACKER, "cpu")
