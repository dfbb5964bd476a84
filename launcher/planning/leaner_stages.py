"""Find layers for pipeline stages that all fit into memory, where those that balance time do not."""

from __future__ import annotations

import dataclasses

from launcher.contract.cost_model.implementation import Implementation
from launcher.contract.cost_model.memory import pipeline_memory
from launcher.contract.cost_model.workload import Layout, Workload


def leaner_stages(
    workload: Workload, layout: Layout, implementation: Implementation, memory_gib: float
) -> Layout | None:
    """Return the layout with other numbers of layers, so that each stage fits into `memory_gib`, or None.

    One layer at a time moves from the fullest stage to the emptiest, where stages have one model chunk each.
    """
    topology = layout.topology
    if topology.virtual_pipeline > 1:
        return None
    split = list(topology.layers_per_stage)
    for _ in range(sum(split)):
        topology = dataclasses.replace(topology, layers_per_stage=tuple(split))
        found = dataclasses.replace(layout, topology=topology)
        memory = [stage.total for stage in pipeline_memory(workload, found, implementation)]
        fullest, emptiest = memory.index(max(memory)), memory.index(min(memory))
        if memory[fullest] <= memory_gib:
            return found
        if split[fullest] == 1 or fullest == emptiest:
            return None
        split[fullest] -= 1
        split[emptiest] += 1
    return None
