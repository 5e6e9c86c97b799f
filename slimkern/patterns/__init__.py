"""Block patterns (``4x1``, ``32x32``, ``1x1``, ``2:4`` ...): masks on linears of full size."""
