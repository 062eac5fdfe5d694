"""The smallest cell there is."""

import torch

from ahn.cells.base import Cell


class Toy(Cell):
    """A running sum: the least a cell must bring."""

    name = "toy"
    num_gates = 1

    def __init__(self, hidden_size, num_heads, head_dim, dtype=torch.float32, device=None):
        super().__init__(hidden_size, num_heads, head_dim, dtype, device)
        self.w_proj = torch.nn.Linear(hidden_size, num_heads, dtype=dtype, device=device)

    def gate_inputs(self, x_BTD):
        return self.w_proj(x_BTD)

    def gates(self, inputs_BTG):
        return (inputs_BTG.float().transpose(1, 2).exp(),)

    def naive(self, q, k, v, gates, state):
        writes = torch.einsum("bntk,bnt,bntv->bntkv", k, gates[0], v).cumsum(2) + state[:, :, None]
        return torch.einsum("bntkv,bntk->bntv", writes, q), writes[:, :, -1]

    def output(self, read_BNTH, x_BTD):
        return self.o_proj(read_BNTH.to(x_BTD.dtype))
