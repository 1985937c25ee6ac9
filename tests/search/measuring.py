"""The in-memory evaluator on the small models of these tests."""

import torch

from matquant.distributed import SINGLE_PROCESS
from matquant.search.allocation_problem import Budget, Layer, exact, make_problem
from matquant.search.evaluator import open_evaluator
from matquant.search.layer_forwards import DecodedSlices, PlaneSlices

WINDOWS = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def units_of(blocks, codes, fused=()):
    index_of = {name: i for i in range(len(blocks)) for name in blocks.linears(i)}
    layers = [Layer(name=n, block=index_of[n], parameters=w.codes.numel(), bytes={}) for n, w in codes.items()]
    return make_problem(layers, (2, 3, 4, 8), Budget(kind="average_bits", value=exact(3)), fused).units


def evaluator(
    blocks, units, codes, fitness="kl", top_k=64, limit=2**30, batch_size=2, planes=False, process_group=SINGLE_PROCESS
):
    slices = PlaneSlices(codes, CPU, torch.float32) if planes else DecodedSlices(codes, CPU, torch.float32, limit)
    return open_evaluator(
        blocks,
        units,
        slices,
        WINDOWS,
        batch_size=batch_size,
        fitness=fitness,
        top_k=top_k,
        device=CPU,
        process_group=process_group,
    )
