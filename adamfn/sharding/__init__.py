"""Meshes of devices: where an optimizer's state is, and steps on the shards of leaves."""

from adamfn.sharding.blocks import whole_blocks
from adamfn.sharding.states import state_shardings
from adamfn.sharding.training import sharded

__all__ = ["sharded", "state_shardings", "whole_blocks"]
