"""Calibration data from files, as batches of a network's inputs."""

from fxmerge.calibration.reading import Batches as Batches
from fxmerge.calibration.reading import read as read
