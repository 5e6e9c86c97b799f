"""The masked state: modules with full-size weights that compute only what is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimkern.ops._columns import zero_columns_
from slimkern.ops.indexed_linear import indexed_linear
from slimkern.shards import local, own_part


class MaskedLinear(nn.Linear):
    """An ``nn.Linear`` of which only some rows and columns take part.

    ``y = x @ weight[rows][:, cols]ᵀ + bias[rows]``: ``x`` has the kept columns only and ``y`` the
    kept rows only. Gradients land in the kept rows and columns of the full-size weight; the rest
    is zero.

    Attributes:
        rows: sorted int64 indices of the kept output features, or ``None`` for all.
        cols: sorted int64 indices of the kept input features, or ``None`` for all.
        gather: the input is complete, and the kept columns are taken from it (where what makes it
            can't be computed in part).
        backend: an implementation of :func:`slimkern.ops.indexed_linear`, or ``None`` for the
            default.

    The index vectors are non-persistent buffers: they follow ``.to(device)``, and the state dict
    is that of the plain linear, with zeros in the columns that are not read: whatever was loaded
    there since stays in the parameter alone (until the next optimizer step), for masks of an
    earlier state that may be loaded next.
    """

    rows: Tensor | None
    cols: Tensor | None
    gather: bool
    backend: str | None

    @classmethod
    def adopt(cls, linear: nn.Linear) -> MaskedLinear:
        """Turn a plain linear into a masked one that keeps everything, in place.

        The same object changes class, so that its parameters stay in optimizers, its hooks stay
        mounted and other references to it see the change.
        """
        if isinstance(linear, cls):
            return linear
        linear.__class__ = cls
        linear.register_buffer("rows", None, persistent=False)
        linear.register_buffer("cols", None, persistent=False)
        linear.gather = False  # type: ignore[assignment]
        linear.backend = None  # type: ignore[assignment]
        return linear  # type: ignore[return-value]

    def release(self) -> nn.Linear:
        """The inverse of :meth:`adopt`: a plain ``nn.Linear`` again, weights untouched."""
        del self._buffers["rows"], self._buffers["cols"], self.gather, self.backend
        self._non_persistent_buffers_set -= {"rows", "cols"}
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @torch.no_grad()
    def zero_masked(self, weight: Tensor | None = None) -> None:
        """Set the columns that are not read to zero: momentum, noise or loading may move them.

        Args:
            weight: a copy of the weight to do it to; by default the weight itself. Of a sharded
                one, this rank's slice is written.
        """
        weight = self.weight if weight is None else weight
        if self.cols is not None:
            zero_columns_(local(weight), self._own(self.cols, weight))

    def _own(self, cols: Tensor, weight: Tensor) -> Tensor:
        """Those of the columns that this rank's slice of a weight has, counted within it."""
        if local(weight) is weight:
            return cols
        whole = torch.zeros(self.in_features, dtype=torch.bool, device=cols.device)
        whole[cols] = True
        return own_part(whole, weight, 1).nonzero().flatten()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(f"{prefix}weight")
        if keep_vars or weight is None or weight.is_meta or self.cols is None or self.cols.is_meta:
            return
        part = local(weight)
        dead = torch.ones(part.shape[1], dtype=torch.bool, device=part.device)
        dead[self._own(self.cols, weight)] = False
        if bool(part[:, dead].any()):
            destination[f"{prefix}weight"] = saved = weight.clone()
            self.zero_masked(saved)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., len(cols)] -> [..., len(rows)]."""
        if self.gather and self.cols is not None:
            input = input.index_select(-1, self.cols)
        return indexed_linear(
            input, self.weight, self.bias, self.rows, self.cols, backend=self.backend
        )

    def extra_repr(self) -> str:
        """The linear's description with what is kept of it."""
        rows = self.out_features if self.rows is None else len(self.rows)
        cols = self.in_features if self.cols is None else len(self.cols)
        return f"{super().extra_repr()}, kept_in={cols}, kept_out={rows}"
