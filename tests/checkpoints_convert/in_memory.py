# SPDX-License-Identifier: Apache-2.0
"""A checkpoint converted in memory, as the plan of its rules says."""

from checkpoints_convert.rules import make_plan
from lvjax.core.params import unflatten


def convert(tensors, rules, spec):
    """The parameter tree of a checkpoint, types as they are; raises as `make_plan`."""
    plan = make_plan({name: tensors[name].shape for name in tensors}, rules, spec)
    return unflatten({place.path: place.array(tensors) for place in plan.places})
