"""How each kernel of matrix products uses its arguments: what of its launches is counted from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Sizes = tuple[str, ...]
GROUPED = "_grouped_kernel"
"""Several products in one launch, each of its own sizes."""


@dataclass(frozen=True)
class Shape:
    """A kernel's operands, by the names of its arguments.

    Attributes:
        operands: pointer or descriptor -> the sizes it has, ``("M", "K")``; ``#0`` to ``#2`` are
            the grid's.
        tile: size that is cut up among programs -> the argument that says how long a piece is.
        outputs: the operands that are written.
        products: each a product of matrices, of 2 flops per element of these sizes.
        masked: operands of which a mask leaves a share.
        skipped: operands whose loads are skipped with the steps that a mask empties.
        only: operand -> (argument, its value) without which it is given and not used.
    """

    operands: Mapping[str, Sizes]
    tile: Mapping[str, str]
    outputs: frozenset[str]
    products: tuple[Sizes, ...] = ()
    masked: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()
    only: Mapping[str, tuple[str, object]] = field(default_factory=dict)


def _tile(*sizes: str) -> dict[str, str]:
    return {size: f"BLOCK_{size}" for size in sizes}


_MK, _NK, _MN = ("M", "K"), ("N", "K"), ("M", "N")
_PRODUCT: dict[str, Sizes] = {"x": _MK, "w": _NK, "add": _MN, "h": _MN, "y": _MN}
_GATED: dict[str, Sizes] = {"x": _MK, "gate": _NK, "up": _NK, "y": _MN}


def _named(operands: Mapping[str, Sizes], end: str) -> dict[str, Sizes]:
    return {name + end: sizes for name, sizes in operands.items()}


SHAPES: dict[str, Shape] = {
    "_product_kernel": Shape(
        {**_named(_PRODUCT, "_ptr"), "b_ptr": ("N",), "rows_ptr": ("N",)},
        _tile("M", "N"),
        frozenset({"h_ptr", "y_ptr"}),
        (("M", "N", "K"),),
    ),
    "_product_descriptor_kernel": Shape(
        {**_named(_PRODUCT, "_desc"), "b_ptr": ("N",), "rows_ptr": ("N",), "y_ptr": _MN},
        _tile("M", "N"),
        frozenset({"h_desc", "y_desc", "y_ptr"}),
        (("M", "N", "K"),),
    ),
    "_gated_kernel": Shape(
        {**_named(_GATED, "_ptr"), "gate_bias_ptr": ("N",), "up_bias_ptr": ("N",)},
        _tile("M", "N"),
        frozenset({"y_ptr"}),
        (("M", "N", "K"),) * 2,
    ),
    "_gated_descriptor_kernel": Shape(
        {**_named(_GATED, "_desc"), "gate_bias_ptr": ("N",), "up_bias_ptr": ("N",), "y_ptr": _MN},
        _tile("M", "N"),
        frozenset({"y_desc", "y_ptr"}),
        (("M", "N", "K"),) * 2,
    ),
    # The grid's second size is the number of slices that the tokens are cut into.
    "_product_dw_kernel": Shape(
        {"gy_ptr": ("M", "R"), "x_ptr": ("M", "C"), "out_ptr": ("#1", "R", "C")},
        _tile("R", "C"),
        frozenset({"out_ptr"}),
        (("M", "R", "C"),),
    ),
    "_dw_descriptor_kernel": Shape(
        {"gy_desc": ("M", "R"), "x_desc": ("M", "C"), "out_ptr": ("S", "R", "C")},
        _tile("R", "C"),
        frozenset({"out_ptr"}),
        (("M", "R", "C"),),
    ),
    "_scatter_sum_kernel": Shape(
        {
            "part_ptr": ("S", "R", "C"),
            "rows_ptr": ("R",),
            "cols_ptr": ("C",),
            "out_ptr": ("N", "K"),
        },
        {},
        frozenset({"out_ptr"}),
    ),
    "_gather_kernel": Shape(
        {
            "w_ptr": ("R", "C"),
            "rows_ptr": ("R",),
            "cols_ptr": ("C",),
            "out_ptr": ("R_OUT", "C_OUT"),
        },
        _tile("R", "C"),
        frozenset({"out_ptr"}),
    ),
    "_block_masked_product_kernel": Shape(
        {"x_ptr": ("M", "R"), "w_ptr": ("P", "R"), "b_ptr": ("P",), "y_ptr": ("M", "P")},
        _tile("M", "P"),
        frozenset({"y_ptr"}),
        (("M", "P", "R"),),
        masked=frozenset({"w_ptr"}),
        skipped=frozenset({"x_ptr", "w_ptr"}),
    ),
    "_block_masked_dw_kernel": Shape(
        {"gy_ptr": ("M", "N"), "x_ptr": ("M", "K"), "out_ptr": ("N", "K")},
        _tile("N", "K"),
        frozenset({"out_ptr"}),
        (("M", "N", "K"),),
        skipped=frozenset({"gy_ptr", "x_ptr"}),
    ),
    "_copy_kernel": Shape(
        {"weight_ptr": ("N", "K"), "out_ptr": ("N", "K")},
        _tile("N", "K"),
        frozenset({"out_ptr"}),
        masked=frozenset({"weight_ptr"}),
        only={"weight_ptr": ("IN_PLACE", False)},
    ),
    # Three weights, of which equally many rows are kept, or one that is handed over three times.
    "_kept_weights_kernel": Shape(
        {
            **{f"w{i}_ptr": ("R", "C") for i in range(3)},
            **{f"b{i}_ptr": ("R",) for i in range(3)},
            **{f"r{i}_ptr": ("R",) for i in range(3)},
            "cols_ptr": ("C",),
            "out_ptr": ("R_OUT", "C_OUT"),
        },
        {},
        frozenset({"out_ptr"}),
        only={f"{name}{i}_ptr": ("PARTS", 3) for name in "wbr" for i in (1, 2)},
    ),
    # Of the tables, a row for each token; what else the tables hold is not read.
    "_embeddings_kernel": Shape(
        {
            "ids_ptr": ("M",),
            "words_ptr": ("M", "H"),
            "types_ptr": ("H",),
            "positions_ptr": ("T", "H"),
            "gamma_ptr": ("H",),
            "beta_ptr": ("H",),
            "y_ptr": ("M", "H"),
        },
        {},
        frozenset({"y_ptr"}),
    ),
}
"""Kernels of products, and what gathers and scatters."""

ROWS = frozenset(
    {
        "_activation_fwd_kernel",
        "_activation_grad_kernel",
        "_add_norm_fwd_kernel",
        "_add_norm_grad_kernel",
        "_column_sums_kernel",
        "_flags_kernel",
        "_joined_heads_kernel",
        "_list_kernel",
        "_row_norm_kernel",
        "_seeded_dropout_kernel",
    }
)
"""Kernels without products that read and write all of each of their tensors once."""
