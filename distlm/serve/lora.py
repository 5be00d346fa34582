"""Low-rank adapters over one model, each sequence of a batch with its own or with none, in one forward pass.

    adapters = Adapters(model, {"poems": folder})
    adapters.choose(["poems", "", "poems"])                # rows of the batch; "" is the base
    model(input_ids=...)

The base's layers compute as ever for the whole batch. To the rows of an adapter that has the layer, the product of its own A and B is then
added, gathered by row as in Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023); other rows keep the bits that they have without.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distlm.model.adapter_folder import AdapterFolder


class Adapters:
    """The matrices on the model's device and in its dtype, and which of them the next forward pass takes."""

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        self.rows: list[str] = []
        self._chosen: dict[tuple[str, ...], tuple[Any, Any] | None] = {}       # of layers that the same adapters have
        found: dict[tuple[str, int, bool], dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {}
        for name, folder in folders.items():
            for module, a, b, magnitude in AdapterFolder.read(folder).matrices():
                found.setdefault((module, len(a), magnitude is not None), {})[name] = a, b, magnitude
        for (module, _, _), of in found.items():
            layer = model.get_submodule(module)
            layer.register_forward_hook(Addition(self, layer, of))

    def choose(self, rows: Sequence[str]) -> None:
        """The adapter of each row of the next forward passes."""
        if self.rows != rows:
            self.rows, self._chosen = list(rows), {}

    def of(self, names: tuple[str, ...], device: torch.device) -> tuple[Any, Any] | None:
        """(rows, places) of those rows whose adapters are among `names`, and the place of each there: a slice where they are all rows, and
        one number where they share an adapter. None where there are no such rows."""
        if names not in self._chosen:
            found = [(row, names.index(name)) for row, name in enumerate(self.rows) if name in names]
            rows, places = [row for row, _ in found], [place for _, place in found]
            self._chosen[names] = (slice(None) if len(rows) == len(self.rows) else torch.tensor(rows, device=device),
                                   places[0] if len(set(places)) == 1 else torch.tensor(places, device=device)) if found else None
        return self._chosen[names]


class Addition:
    """What the adapters of one rank add to one layer, those with a magnitude apart: nothing is padded."""

    def __init__(self, adapters: Adapters, layer: Any, of: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> None:
        self.adapters, self.names = adapters, tuple(of)
        where = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.a = torch.stack([a for a, _, _ in of.values()]).to(**where)   # [adapters, rank, in]
        self.b = torch.stack([b for _, b, _ in of.values()]).to(**where)   # [adapters, out, rank]
        gains = [magnitude.to(layer.weight.device) / row_lengths(layer, a, b) for a, b, magnitude in of.values() if magnitude is not None]
        self.gain = torch.stack(gains)[:, None].to(**where) if gains else None         # [adapters, 1, out]

    def __call__(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """In place: `output` is the layer's own and new. With DoRA W' = m (W + B A) / |W + B A| by rows (Liu et al. 2024, equation 5), and
        m / |W + B A| does not change while it is served."""
        chosen = self.adapters.of(self.names, output.device)
        if chosen is None:
            return
        rows, places = chosen
        num_rows = len(self.adapters.rows)
        given = inputs[0].reshape(num_rows, -1, inputs[0].shape[-1])[rows]
        added = (given @ self.a[places].mT) @ self.b[places].mT
        whole = output.view(num_rows, -1, output.shape[-1])
        if self.gain is None and isinstance(rows, slice):
            whole += added
        elif self.gain is None:
            whole.index_add_(0, rows, added)
        else:
            bias = 0 if layer.bias is None else layer.bias
            whole[rows] = (whole[rows] - bias + added) * self.gain[places] + bias


def row_lengths(layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|W + B A| of every row [out], in float32."""
    weight = layer.weight.detach().float()
    if not isinstance(layer, torch.nn.Linear):             # Conv1D has the rows as columns
        weight = weight.T
    return torch.linalg.norm(weight + (b @ a).to(weight.device), dim=1)
