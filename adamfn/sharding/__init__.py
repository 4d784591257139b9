# SPDX-License-Identifier: Apache-2.0
"""Meshes of devices: where an optimizer's state is, and steps on the shards of leaves."""

from adamfn.sharding.state_shardings import state_shardings
from adamfn.sharding.training import sharded
from adamfn.sharding.whole_blocks import whole_blocks

__all__ = ["sharded", "state_shardings", "whole_blocks"]
