"""Switch linear layer: each token uses one of several experts.

Letters: T tokens of a call, M experts, S places of an expert (its capacity).
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.utils import (
    check_at_least,
    check_number,
    check_positive,
)

ROUTER_STD = 0.02


class SwitchLinear(nn.Module):
    """Top-1 mixture of experts in the place of ``nn.Linear``.

    Paper: `Switch Transformer <https://arxiv.org/abs/2101.03961>`_, section
    2, for one projection rather than for a whole FFN. A token ``x`` goes to
    the expert ``i`` that the router finds most probable and gets
    ``p_i(x) (W_i x + b_i)``. The probability is what trains the router.

    In training an expert has ``ceil(capacity_factor T / M)`` places. Tokens
    beyond them, the later ones of a batch, get zeros: in a LLaMA block the
    product of gate and up projection is then zero too, so that the token
    passes the block's FFN by its residual, as in Switch Transformer. In
    evaluation no token is dropped by default, since what a token gets would
    otherwise depend on the rest of the batch, and decoding token by token
    would differ from reading the whole text.

    After a forward pass ``aux_loss`` is the load-balancing loss
    ``M sum_i f_i P_i`` (1 if balanced), ``load`` the share of tokens ``f_i``
    that chose each expert, shape (M, ), and ``dropped`` the share of tokens
    that found no place. Tokens that ``token_mask`` (set from outside, the
    shape of the tokens, False for padding) leaves out take no place, do not
    count and get zeros.

    Args:
        in_features (int): Width of the input.
        out_features (int): Width of the output.
        num_experts (int): ``M``. Defaults to 4.
        bias (bool): Whether experts have a bias. Defaults to False.
        capacity_factor (float, optional): Places in training, relative to an
            even share; None for as many as are needed. Defaults to 1.25.
        eval_capacity_factor (float, optional): The same in evaluation.
            Defaults to None.
        jitter (float): The router's input is multiplied by random numbers
            from ``1 - jitter`` to ``1 + jitter`` in training. Defaults to 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 4,
        bias: bool = False,
        capacity_factor: Optional[float] = 1.25,
        eval_capacity_factor: Optional[float] = None,
        jitter: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        check_at_least('in_features', in_features)
        check_at_least('out_features', out_features)
        check_at_least('num_experts', num_experts)
        for name, factor in (
            ('capacity_factor', capacity_factor),
            ('eval_capacity_factor', eval_capacity_factor),
        ):
            if factor is not None:
                check_positive(name, factor)
        check_number('jitter', jitter, 0, 1)
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.jitter = jitter
        where = dict(device=device, dtype=dtype)
        self.router = nn.Linear(in_features, num_experts, bias=False, **where)
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, **where)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, **where))
            if bias
            else None
        )
        self.token_mask = None
        self.forget()
        self.reset_parameters()

    def forget(self) -> None:
        """Drop what the last forward pass left behind."""
        self.aux_loss = self.load = self.dropped = None

    def reset_parameters(self) -> None:
        """Experts as ``nn.Linear``; a router that starts nearly even."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.router.weight, std=ROUTER_STD)

    def extra_repr(self) -> str:
        """Sizes and limits."""
        return (
            f'in_features={self.in_features}, '
            f'out_features={self.out_features}, '
            f'num_experts={self.num_experts}, '
            f'bias={self.bias is not None}, '
            f'capacity_factor={self.capacity_factor}, '
            f'eval_capacity_factor={self.eval_capacity_factor}'
        )

    def capacity(self, tokens: int) -> Optional[int]:
        """Places ``S`` of an expert for T tokens; None without a limit."""
        factor = (
            self.capacity_factor
            if self.training
            else self.eval_capacity_factor
        )
        if factor is None:
            return None
        return min(tokens, math.ceil(factor * tokens / self.num_experts))

    def route(self, x: Tensor) -> Tensor:
        """Probabilities of the experts in float32, shape (T, M)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(
                    1 - self.jitter, 1 + self.jitter
                )
            return F.linear(x, self.router.weight.float()).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Send each token to its expert.

        Args:
            x (Tensor): Shape (..., in_features).

        Returns:
            Tensor: Shape (..., out_features).
        """
        tokens = x.reshape(-1, self.in_features)
        probs = self.route(tokens)
        prob, chosen = probs.max(dim=-1)
        hits = F.one_hot(chosen, self.num_experts)
        mask = self._mask(x)
        if mask is not None:
            hits = hits * mask.unsqueeze(-1)
        capacity = self.capacity(len(tokens))
        if capacity is None:
            out, kept = self._without_limit(tokens, chosen), mask
        else:
            out, kept = self._with_places(tokens, chosen, hits, capacity)
        if kept is not None:
            prob = prob * kept
        self._note(probs, hits, mask, kept)
        out = out * prob.to(out.dtype).unsqueeze(-1)
        return out.view(*x.shape[:-1], self.out_features)

    def _mask(self, x: Tensor) -> Optional[Tensor]:
        """Return the mask of tokens that count, shape (T, ); None for all.

        A mask that covers earlier tokens too, kept in a cache, is cut.
        """
        mask = self.token_mask
        if mask is None or x.dim() != 3 or mask.dim() != 2:
            return None
        mask = mask[:, -x.shape[1] :]
        return mask.flatten() if mask.shape == x.shape[:-1] else None

    def _with_places(
        self, tokens: Tensor, chosen: Tensor, hits: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """One batched product over places; shapes depend on no values."""
        before = hits.cumsum(dim=0).gather(1, chosen[:, None])[:, 0] - 1
        counts = hits.gather(1, chosen[:, None])[:, 0] > 0
        kept = counts & (before < capacity)
        # Tokens without a place share one beyond the last.
        last = self.num_experts * capacity
        place = torch.where(kept, chosen * capacity + before, last)
        rows = tokens.new_zeros(last + 1, self.in_features)
        rows = rows.index_copy(0, place, tokens)
        rows = rows[:last].view(self.num_experts, capacity, self.in_features)
        out = rows @ self.weight.mT
        if self.bias is not None:
            out = out + self.bias.unsqueeze(1)
        out = F.pad(out.flatten(0, 1), (0, 0, 0, 1))
        return out[place], kept

    def _without_limit(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Sorted by expert, one product each; none of tokens is fine too.

        An expert without tokens gets a gradient of zeros rather than none,
        for which several processes would wait.
        """
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.num_experts).tolist()
        parts = tokens[order].split(counts)
        biases = [None] * len(parts) if self.bias is None else self.bias
        out = torch.cat(
            [F.linear(*item) for item in zip(parts, self.weight, biases)]
        )
        return out[order.argsort()]

    def _note(
        self,
        probs: Tensor,
        hits: Tensor,
        mask: Optional[Tensor],
        kept: Optional[Tensor],
    ) -> None:
        """Keep balance and loss; a call without tokens leaves zeros."""
        if mask is not None:
            probs = probs * mask.unsqueeze(-1)
        total = hits.sum().clamp(min=1)
        self.load = hits.sum(dim=0) / total
        mean = probs.sum(dim=0) / total
        self.aux_loss = self.num_experts * (self.load * mean).sum()
        self.dropped = self.load.new_zeros(())
        if kept is not None:
            self.dropped = (hits.sum() - kept.sum()) / total
