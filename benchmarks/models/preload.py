"""Imported once, by the process from which those that run a model are forked.

The first capture and inference import parts of torch. That takes longer than most models, and is no property
of them.
"""

from __future__ import annotations

import torch
from torch import nn

from fxmerge.program.capture import capture_program
from fxmerge.symmetry.group import analyse

torch.set_num_threads(1)
_traced = capture_program(nn.Sequential(nn.Linear(2, 2)), (torch.zeros(2, 2),))
_exported = capture_program(_traced.aten.exported)
analyse(_exported)
