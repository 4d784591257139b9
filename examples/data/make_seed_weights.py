# SPDX-License-Identifier: Apache-2.0
"""Writes `seed_weights.json`: what torch.manual_seed(0) makes of Linear(2, 16)-ReLU-Linear(16, 1).

Needs torch; nothing else here does.

    python examples/data/make_seed_weights.py
"""

import json
from pathlib import Path

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
# A float32 written as the float64 of the same value reads back to the last bit.
weights = {
    "hidden": {"kernel": model[0].weight.T.tolist(), "bias": model[0].bias.tolist()},
    "out": {"kernel": model[2].weight.T.tolist(), "bias": model[2].bias.tolist()},
}
path = Path(__file__).with_name("seed_weights.json")
path.write_text(json.dumps(weights, indent=1) + "\n")
