"""Full fine-tuning: every weight of a plain checkpoint is trained, and a plain checkpoint is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource, tensor_bytes, torch_dtype
from svdconvert.config.sizes import parse_size
from svdconvert.config.train import TrainOptions
from svdconvert.errors import ArtifactError
from svdconvert.layouts.base import LAYOUTS, Layout
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.output.sidecars import complete_checkpoint
from svdconvert.output.staging import StagedOutput
from svdconvert.training.model.load import load_network
from svdconvert.training.start import TrainingStart


@dataclass(frozen=True)
class FineTunedModel:
    """A network of which everything is trained, and the checkpoint that it ends in."""

    start: TrainingStart
    network: nn.Module
    source: TensorSource

    @staticmethod
    def load(start: TrainingStart, *, trust_remote_code: bool) -> "FineTunedModel":
        """In float32, whatever the checkpoint is stored in: a small step is nothing to a bfloat16 number.

        Raises ArtifactError where what is trained could not be written back under the checkpoint's names.
        """
        layout = LAYOUTS.get(start.layout)
        network = load_network(start.weights, layout, torch.float32, trust_remote_code=trust_remote_code)
        network.requires_grad_(True)
        found = FineTunedModel(start, network, open_checkpoint(start.weights))
        written = {id(parameter) for parameter in found._live(layout).values()}
        for name, parameter in network.named_parameters():
            if id(parameter) not in written:
                raise ArtifactError(
                    f"{start.weights} stores {name} under another name or in other pieces than it is trained "
                    "in; train this model with an adapter"
                )
        return found

    def _live(self, layout: Layout) -> dict[str, Tensor]:
        """Tensor on disk -> parameter, of those that are parameters."""
        known = dict(self.network.named_parameters(remove_duplicate=False))
        names = {name: layout.runtime_name(name) for name in self.source.infos}
        return {name: known[path] for name, path in names.items() if path in known}

    @property
    def files(self) -> list[PlannedFile]:
        """The shards, in the source's names and element types."""
        return plan_model(list(self.source.infos.values()), parse_size("5GB"))

    def write(self, staged: StagedOutput) -> dict[str, dict[str, str]]:
        """Write the checkpoint; checksums by file."""
        live, marks = self._live(LAYOUTS.get(self.start.layout)), dict[str, dict[str, str]]()
        for file in self.files:
            for info in file.infos:
                tensor = live[info.name].detach() if info.name in live else self.source.read(info.name)
                stored = tensor.to("cpu", torch_dtype(info.dtype)).contiguous()
                staged.write(file.path, info.name, stored)
                marks.setdefault(file.path, {})[info.name] = checksum(tensor_bytes(stored))
        complete_checkpoint(Path(self.start.weights), staged.path, self.files)
        return marks

    def manifest(self, plan: TrainOptions, files: Mapping[str, Mapping[str, str]], threads: int) -> Manifest:
        """Of a plain checkpoint."""
        return Manifest(
            kind="finetuned",
            layout=self.start.layout,
            method=self.start.method,
            base=self.start.base,
            options=plan.shaping(),
            files=files,
            roles=roles_of(self.files),
            threads=threads,
        )
