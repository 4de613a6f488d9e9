"""This rank's experts of one layer: read in the checkpoint's format, brought to the wanted one.

A conversion takes a few experts at a time, so that what is in memory beside the result is one chunk: its stored bytes
and its values in bfloat16 (exact for MXFP4), `chunk_bytes` or one expert, whichever is more. Joining the chunks holds
the matrix twice for a moment.

Letters: L experts on this rank · N output rows of a matrix · H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epmoe.errors import UserError
from epmoe.formats import ExpertMatrix, ExpertWeights, ReadExperts
from epmoe.streams import tell
from epmoe.weights.manifest import Matrix
from epmoe.weights.source import Source


@dataclass(frozen=True)
class Limits:
    """Memory that loading may take beside the weights."""

    chunk_bytes: int = 256 << 20  # of the values in bfloat16 that are converted at a time


class ExpertReader:
    """Reads the experts `ids` (this rank's, ascending) of a source onto a device; `scale` is of SCALES."""

    def __init__(
        self,
        source: Source,
        ids: Sequence[int],
        device: torch.device,
        limits: Limits | None = None,
        scale: str = "ocp",
    ) -> None:
        self.source, self.ids, self.device, self.limits, self.scale = source, ids, device, limits or Limits(), scale
        self.on_host = device.type == "cpu"  # where conversions run; the host too once the device was too full
        self.finite: dict[str, torch.Tensor] = {}  # bool [L] by the stored name; on the device until `check_finite`

    def weights(self, gate_up: Matrix, down: Matrix, dtype: torch.dtype) -> ExpertWeights:
        """One layer's weights, biases in `dtype`. Whether all of them are numbers, `check_finite` says.

        Raises:
            torch.OutOfMemoryError: they do not fit on the device.
        """
        found = ExpertWeights(
            gate_up=self.matrix(gate_up),
            gate_up_bias_LN=self.bias(gate_up, dtype),
            down=self.matrix(down),
            down_bias_LH=self.bias(down, dtype),
        )
        for matrix, values in ((gate_up, found.gate_up), (down, found.down)):
            self.finite[matrix.name] = values.finite_L()
        return found

    def check_finite(self) -> None:
        """Of all layers that were read; waits for the device, which else would stand idle after each.

        Raises:
            UserError: a weight or a bias of an expert that is not finite: the activation's clamp would make numbers of
                its infinities. What is not finite in any other weight reaches the logits, which are looked at.
        """
        if not self.finite:
            return
        finite_XL = torch.stack(list(self.finite.values()))
        for name, row in zip(self.finite, finite_XL.tolist(), strict=True):
            if not all(row):
                file = next(info.file for stored, info in self.source.tensors.items() if stored.startswith(name))
                raise UserError(
                    f"{file}: {name} of expert {self.ids[row.index(False)]} holds NaN or an infinity: "
                    "download the checkpoint again"
                )

    def matrix(self, matrix: Matrix) -> ExpertMatrix:
        """One projection as `matrix.wanted`; when the device is too full to convert there, by way of the host."""
        if matrix.stored is matrix.wanted:
            return matrix.stored.read(matrix.name, self.ids, self._to(self.device))
        if not self.on_host:
            try:
                return self._convert(matrix, self.device)
            except torch.OutOfMemoryError:
                # Retry after this block: while it lasts, the exception keeps the failed try's tensors alive.
                self.on_host = True
            tell(
                f"epmoe: {self.device} is too full to convert {matrix.name} from {matrix.stored.format} to "
                f"{matrix.wanted.format}: it and the matrices after it are converted on the host, which is slower"
            )
        return self._convert(matrix, torch.device("cpu")).to(self.device)

    def _convert(self, matrix: Matrix, device: torch.device) -> ExpertMatrix:
        _, rows, columns = matrix.shape
        count = max(1, self.limits.chunk_bytes // (rows * columns * torch.bfloat16.itemsize))
        parts = []
        for start in range(0, len(self.ids), count):
            part = matrix.stored.read(matrix.name, self.ids[start : start + count], self._to(device))
            parts.append(matrix.wanted.quantize(part.dequantize(torch.bfloat16), self.scale))
        return parts[0] if len(parts) == 1 else matrix.wanted.cat(parts)

    def bias(self, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        if matrix.bias is None:
            return torch.zeros(len(self.ids), matrix.shape[1], dtype=dtype, device=self.device)
        bias_LN = self._to(self.device)(matrix.bias, self.ids).to(dtype)
        self.finite[matrix.bias] = bias_LN.isfinite().all(1)
        return bias_LN

    def _to(self, device: torch.device) -> ReadExperts:
        return lambda name, ids: self.source.read_rows(name, ids, device)
