"""The weights inside an opened `.nemo`: which tensors it holds, and reading them one layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from steerlm_nemo.checkpoint.archive import WEIGHTS_DIR, NemoFile
from steerlm_nemo.checkpoint.mapping import Layout, Rule
from steerlm_nemo.checkpoint.torch_dist import INDEX, Index, StoredRows, parse_index, read_slab, stored_rows
from steerlm_nemo.checkpoint.zarr_index import zarr_index
from steerlm_nemo.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class DistributedWeights:
    """The `model_weights/` folder of a `.nemo`, in Megatron's torch_dist or zarr format.

    Raises:
        CheckpointError: there is none, it is in another format, or its index is unsafe or damaged.
    """

    def __init__(self, nemo: NemoFile) -> None:
        self._nemo = nemo
        self.where = f"{nemo.path}:{WEIGHTS_DIR}"
        index_name = f"{WEIGHTS_DIR}/{INDEX}"
        if index_name in nemo.members:
            self.format = "torch_dist"
            with nemo.open(index_name) as member:
                self.index: Index = parse_index(member, f"{nemo.path}:{index_name}")
            return
        self.format = "zarr"
        self.index = zarr_index(nemo, WEIGHTS_DIR)
        if not self.index.tensors:
            is_legacy = any(name.endswith(".ckpt") for name in nemo.members)
            found = "a legacy model_weights.ckpt (mcore_gpt: false)" if is_legacy else "no weights"
            raise CheckpointError(f"{nemo.path}: expected {index_name} or zarr arrays, but it holds {found}")

    def open_file(self, name: str) -> IO[bytes]:
        return self._nemo.open(f"{WEIGHTS_DIR}/{name}")

    @functools.cached_property
    def dtype(self) -> str:
        """The one dtype of all tensors."""
        dtypes = {tensor.dtype for tensor in self.index.tensors.values()}
        if len(dtypes) != 1:
            raise CheckpointError(
                f"{self.where}: tensors of {', '.join(sorted(dtypes)) or 'no'} dtype; expected one dtype"
            )
        return dtypes.pop()

    def require(self, rules: Iterable[Rule], layout: Layout) -> None:
        """Raise CheckpointError listing every tensor that is missing, left over or of another shape."""
        expected = {rule.mcore: layout.global_shape(rule) for rule in rules}
        found = {key: tensor.shape for key, tensor in self.index.tensors.items()}
        problems = [f"{key} is missing" for key in expected if key not in found]
        problems += [f"{key} has no place in a Llama" for key in found if key not in expected]
        problems += [
            f"{key} has shape {list(found[key])}, {list(shape)} expected from the config"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ]
        if problems:
            shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
            raise CheckpointError(f"{self.where}: tensors and config do not fit together:\n  " + "\n  ".join(shown))

    def rows(self, key: str, layer: int | None) -> list[StoredRows] | None:
        """Where the rows of `read`'s result lie in the data files; None where they must be put together by `read`."""
        return stored_rows(self.index.tensors[key], layer, self.open_file, self.where)

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """One tensor, or one layer of a stacked one."""
        return read_slab(self.index.tensors[key], layer, self.open_file, self.where)
