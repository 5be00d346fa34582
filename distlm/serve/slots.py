"""The key-value cache of many sequences of different lengths: one row each, decoded together in one forward pass.

Rows 0..n-1 are in use, and row i holds `lengths[i]` positions. A decode step writes each row's new key at its own end and
attends over the longest row's width; a mask hides what lies beyond a row's own end. When a row leaves, the last takes its place,
so a step works on views and never gathers.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


class SlotCache(Cache):
    """Rows of keys and values, per layer [rows, heads, width, dim]; both dimensions grow by doubling."""

    def __init__(self, num_layers: int, max_rows: int, context: int) -> None:
        self.slots = [SlotLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.slots])
        self.max_rows, self.context = max_rows, context
        self.lengths: list[int] = []

    def join(self, prefilled: DynamicCache, length: int) -> None:
        """Append a row: the cache of one sequence of `length` positions, as a forward pass left it."""
        row = len(self.lengths)
        assert row < self.max_rows and length <= self.context
        for layer, source in zip(self.slots, prefilled.layers, strict=True):
            assert type(source) is DynamicLayer and source.keys is not None and source.values is not None
            layer.reserve(row + 1, length + 1, self.max_rows, self.context, source.keys, source.values)
            layer.keys[row, :, :length] = source.keys[0]
            layer.values[row, :, :length] = source.values[0]
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Free a row; the last row moves into its place."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row != last:
            for layer in self.slots:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()

    def step(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for a token in every row. Returns positions int64[rows, 1] and an additive mask dtype[rows, 1, 1, width]."""
        width = max(self.lengths) + 1
        positions = torch.tensor(self.lengths, device=device)
        rows = torch.arange(len(self.lengths), device=device)
        for layer in self.slots:
            layer.reserve(len(self.lengths), width, self.max_rows, self.context, layer.keys, layer.values)
            layer.rows, layer.positions, layer.width = rows, positions, width
        hidden = torch.arange(width, device=device)[None, :] > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
        self.lengths = [length + 1 for length in self.lengths]
        return positions[:, None], mask[:, None, None, :]


class SlotLayer(CacheLayerMixin):
    """One layer's rows."""

    keys: Any
    values: Any
    rows: torch.Tensor
    positions: torch.Tensor
    width = 0

    def reserve(self, rows: int, width: int, max_rows: int, context: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Grow to `rows` and `width` at least, shaped like `keys` and `values`. New places are zero: garbage could be NaN. Where memory
        runs out no row is lost: keys may have grown, and values not yet."""
        if self.keys is None:
            self.keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[3])
            self.values = values.new_zeros(0, values.shape[1], 0, values.shape[3])
            self.is_initialized = True
        for name in ("keys", "values"):
            old = getattr(self, name)
            old_rows, old_width = old.shape[0], old.shape[2]
            if rows <= old_rows and width <= old_width:
                continue
            new_rows = old_rows if rows <= old_rows else min(max_rows, max(rows, 2 * old_rows))
            new_width = old_width if width <= old_width else min(context, max(width, 2 * old_width, 64))
            new = old.new_zeros(new_rows, old.shape[1], new_width, old.shape[3])
            new[:old_rows, :, :old_width] = old
            setattr(self, name, new)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one key and value per row. Returns [rows, heads, width, dim] of both."""
        num_rows = key_states.shape[0]
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        return self.keys[:num_rows, :, :self.width], self.values[:num_rows, :, :self.width]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("rows are made by reserve")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_seq_length(self) -> int:
        return max(self.width - 1, 0)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length                   # its name before transformers 5.23
