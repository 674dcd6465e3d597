"""The stacked single-precision Muon takes the steps of torch's."""

from __future__ import annotations

import torch
from torch import nn

from earlyexit.training.muon import Muon, orthogonal


def test_it_takes_the_steps_of_torch():
    """torch iterates in bfloat16, 8 bits of mantissa: each entry of an update differs by about 1 %."""
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = torch.cat([p.detach().flatten() for p in ours])
    a = Muon(ours, 0.1, 0.02)
    b = torch.optim.Muon(theirs, 0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        a.step()
        b.step()
    moved, expected = (
        torch.cat([p.detach().flatten() for p in ps]) - start for ps in (ours, theirs)
    )
    assert (moved - expected).norm() < 0.02 * expected.norm()


def test_singular_values_come_near_one_and_vectors_stay():
    u, _, v = torch.linalg.svd(torch.randn(3, 6, 4, dtype=torch.float64), full_matrices=False)
    values = torch.tensor([1.0, 0.5, 0.1, 0.03], dtype=torch.float64)
    out = u.mT @ orthogonal(u @ torch.diag(values) @ v) @ v.mT
    diagonal = out.diagonal(dim1=1, dim2=2)
    assert (out - torch.diag_embed(diagonal)).abs().max() < 1e-12
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3


def test_a_weight_without_gradient_and_a_zero_gradient_stay():
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))]
    weights[1].grad = torch.zeros(2, 3)
    Muon(weights, 0.1, 0.0).step()
    assert all((w == 1).all() for w in weights)
