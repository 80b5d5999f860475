"""What a training run writes: a trained adapter, or a fully fine-tuned checkpoint, behind one protocol."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svdconvert.adapters.adapter_config import CONFIG, WITH_PARAMETERS, AdapterConfig
from svdconvert.adapters.extra_parameters import contains_adapters, declaration, extra_key
from svdconvert.adapters.peft_files import WEIGHTS, adapter_infos, key
from svdconvert.adapters.stacked import Stack, stacks_of
from svdconvert.checkpoint.parts import index_of
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code, tensor_bytes, torch_dtype
from svdconvert.config.execution import Run
from svdconvert.config.sizes import parse_size
from svdconvert.config.train import TrainOptions
from svdconvert.errors import ArtifactError
from svdconvert.inputs.model import layout_of_weights
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.results import TrainResult
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.manifest.training import recorded_training
from svdconvert.methods.base import METHODS, init_folder
from svdconvert.output.plan import FileRole, PlannedFile, plan_file, plan_model
from svdconvert.output.sidecars import complete_checkpoint
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.adapter_plan import write_stack
from svdconvert.pipeline.runner import file_checksums
from svdconvert.training.data.dataset import TrainingData
from svdconvert.training.data.packing import require_packing_support
from svdconvert.training.model.extra_parameters import ParameterShapes, extract_parameters, unfreeze
from svdconvert.training.model.inject import extract_factors, inject_adapters
from svdconvert.training.model.load import head_config, load_classifier, load_network
from svdconvert.training.model.quantised_loading import densify, open_quantised
from svdconvert.training.model.residuals import replace_weights
from svdconvert.training.start import AdapterStart, FullStart, TrainingStart

_SHARD_SIZE = "5GB"
_HEAD = re.compile(r"^(classifier|score)\..*")


class TrainedOutput(Protocol):
    """A network in training, and the directory that is made of it afterwards."""

    @property
    def network(self) -> nn.Module:
        """The network to train, with its trainable parameters marked."""

    @property
    def files(self) -> list[PlannedFile]:
        """The weight files of the directory; known before training."""

    def write_weights(self, staged: StagedOutput) -> None:
        """Write the weights as they are now."""

    def write_sidecars(self, directory: Path) -> None:
        """Write everything that belongs next to the weights."""

    def manifest(self, options: TrainOptions, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the directory."""


def load_output(
    start: TrainingStart,
    options: TrainOptions,
    data: TrainingData,
    mixed_precision: str,
    run: Run,
) -> TrainedOutput:
    """Load the network of `start` and make it trainable.

    Raises CheckpointError or ArtifactError if it cannot be loaded, or cannot be written back after training.
    """
    if isinstance(start, FullStart):
        return FineTunedModel.load(start, data.prompt_format, run)
    # Under autocast the frozen weights keep their stored dtype; without it everything is float32.
    dtype = torch.float32 if mixed_precision == "no" else None
    return TrainedAdapter.load(start, options, data, dtype, run)


@dataclass(frozen=True)
class TrainedAdapter:
    """A network with adapters: the output is the trained adapter and, in a folder, the initial one."""

    start: AdapterStart
    network: nn.Module
    head: Mapping[str, Any]
    """The entries of config.json that describe a new head; empty if there is none."""
    prompt_format: str | None = None

    @staticmethod
    def load(
        start: AdapterStart,
        options: TrainOptions,
        data: TrainingData,
        dtype: torch.dtype | None,
        run: Run,
    ) -> "TrainedAdapter":
        """Load the weights in `dtype`, or as stored if that is None, and inject the adapters."""
        layout = layout_of_weights(start.layout, start.weights)
        head: Mapping[str, Any] = {}
        if data.labels is None:
            network = load_network(start.weights, layout, dtype, run)
        else:
            network, new_parameters = load_classifier(
                start.weights, layout, dtype, data.labels, options.seed, run
            )
            head = head_config(network)
            start = replace(start, fully_trained={**start.fully_trained, **new_parameters})
        paths = start.network_paths()
        replace_weights(network, start.residuals, start.matrices, paths, dtype)
        if options.packing:
            require_packing_support(network)
        inject_adapters(
            network,
            start.scaled_factors(),
            METHODS.get(start.method).trains,
            options.dropout,
            corrected=options.corrected_gradient,
            paths=paths,
            projections=start.projections(),
        )
        unfreeze(network, start.fully_trained, layout)
        return TrainedAdapter(start, network, head, data.prompt_format)

    @property
    def files(self) -> list[PlannedFile]:
        """The trained and the initial adapter."""
        return [self._trained_file, self._initial_file]

    @property
    def _trained_file(self) -> PlannedFile:
        return _plan_adapter(WEIGHTS, "adapter", self.start.factors, torch.float32, self.start.fully_trained)

    @property
    def _initial_file(self) -> PlannedFile:
        return _plan_adapter(
            f"{init_folder(self.start.method)}/{WEIGHTS}", "initial_adapter", self.start.factors
        )

    def write_weights(self, staged: StagedOutput) -> None:
        """Write both adapters."""
        start = self.start
        parameters = extract_parameters(
            self.network, start.fully_trained, layout_of_weights(start.layout, start.weights)
        )
        _write_adapter(staged, self._initial_file, start.factors)
        _write_adapter(staged, self._trained_file, extract_factors(self.network), parameters)

    def write_sidecars(self, directory: Path) -> None:
        """Write the configurations of both adapters."""
        (directory / CONFIG).write_text(self._trained_config().text())
        (directory / init_folder(self.start.method) / CONFIG).write_text(self.start.config.text())

    def _trained_config(self) -> AdapterConfig:
        start = self.start
        modules, bias = declaration(start.fully_trained, start.factors)
        needs_own_type = contains_adapters(start.fully_trained, start.factors)
        config = replace(
            start.config,
            base=_hub_repository(start),
            modules_to_save=modules,
            bias=bias,
            peft_type=WITH_PARAMETERS if needs_own_type else start.config.peft_type,
        )
        if not self.head:
            return config
        # PEFT saves the entire classifier as one module, so its parts must not be declared separately.
        modules = sorted({_HEAD.sub(r"\1", module) for module in modules})
        return replace(config, task="SEQ_CLS", modules_to_save=modules)

    def manifest(self, options: TrainOptions, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of a trained adapter."""
        rank = max(matrix.rank for matrix in self.start.matrices.values())
        return Manifest(
            kind="trained",
            layout=self.start.layout,
            method=self.start.method,
            base=self.start.base,
            residual=self.start.residual,
            base_is_residual=self.start.base_is_residual,
            options=options.shaping(),
            result=TrainResult(head=self.head or None),
            training=recorded_training(staged.path, options.shaping(), rank, self.prompt_format),
            matrices=self.start.matrices,
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )


def _hub_repository(start: AdapterStart) -> str | None:
    """The Hub repository of the weights that the adapter belongs to, if they are from the Hub."""
    origin = start.residual or start.base
    return origin.location if origin and origin.revision else None


def _plan_adapter(
    path: str,
    role: FileRole,
    factors: Mapping[str, Factors],
    dtype: torch.dtype | None = None,
    fully_trained: ParameterShapes | None = None,
) -> PlannedFile:
    """The adapter's file at `path`: factors in `dtype`, by default their own; other parameters in float32."""
    infos: list[TensorInfo] = []
    for module, module_factors in _single_modules(factors).items():
        for name, tensor in module_factors.pieces().items():
            infos += adapter_infos(module, {name: tuple(tensor.shape)}, dtype_code(dtype or tensor.dtype))
    for stack in _stacks(factors):
        stored = dtype or factors[stack.members[0].module].left_OR.dtype
        infos += stack.infos(dtype_code(stored))
    infos += [
        TensorInfo(extra_key(name, factors), shape, "F32") for name, shape in (fully_trained or {}).items()
    ]
    return plan_file(path, infos, role)


def _write_adapter(
    staged: StagedOutput,
    file: PlannedFile,
    factors: Mapping[str, Factors],
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Write all tensors of an adapter's file."""
    tensors = {
        key(module, name): tensor
        for module, module_factors in _single_modules(factors).items()
        for name, tensor in module_factors.pieces().items()
    }
    for stack in _stacks(factors):
        dtype = dtype_code(factors[stack.members[0].module].left_OR.dtype)
        write_stack(staged, file.path, stack, dtype, partial(_rows_of, factors))
    tensors |= {extra_key(name, factors): tensor for name, tensor in (parameters or {}).items()}
    for name, tensor in tensors.items():
        _write_tensor(staged, file.path, name, tensor)


def _single_modules(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Those whose factors have tensors of their own in an adapter's file."""
    return {module: each for module, each in factors.items() if index_of(module) is None}


def _stacks(factors: Mapping[str, Factors]) -> list[Stack]:
    """Those whose factors are stored together, with all experts of a parameter."""
    shapes = {
        module: (each.left_OR.shape[0], each.right_RI.shape[1], each.rank) for module, each in factors.items()
    }
    cores = {name for each in factors.values() for name in each.pieces()} - {"lora_A", "lora_B"}
    return stacks_of(shapes, next(iter(cores), None))


def _rows_of(factors: Mapping[str, Factors], module: str, factor: str, rows: slice) -> Tensor:
    return factors[module].pieces()[factor][rows]


def _write_tensor(staged: StagedOutput, file: str, name: str, tensor: Tensor) -> None:
    staged.write(file, name, tensor)
    staged.finish(f"{file}: {name}", {"files": {file: {name: checksum(tensor_bytes(tensor))}}})


@dataclass(frozen=True)
class FineTunedModel:
    """A network that is trained in full: the output is a plain checkpoint."""

    start: FullStart
    network: nn.Module
    source: TensorSource
    """The checkpoint that training starts from."""
    prompt_format: str | None = None

    @staticmethod
    def load(start: FullStart, prompt_format: str | None, run: Run) -> "FineTunedModel":
        """Load the checkpoint in float32, whatever its stored dtype: bfloat16 would round small updates away.

        Raises ArtifactError if a trained parameter could not be written back under the checkpoint's names.
        """
        layout = layout_of_weights(start.layout, start.weights)
        network = load_network(start.weights, layout, torch.float32, run)
        densify(network, torch.float32)
        network.requires_grad_(True)
        source = open_quantised(start.weights) or open_checkpoint(start.weights)
        model = FineTunedModel(start, network, source, prompt_format)
        stored = {id(parameter) for parameter in model._parameters_by_tensor().values()}
        for name, parameter in network.named_parameters():
            if id(parameter) not in stored:
                raise ArtifactError(
                    f"{start.weights} stores {name} under another name or in other pieces than the network "
                    "has it; train this model with an adapter"
                )
        return model

    def _parameters_by_tensor(self) -> dict[str, Tensor]:
        """Tensor on disk -> parameter of the network, for all tensors that are parameters."""
        layout = layout_of_weights(self.start.layout, self.start.weights)
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        paths = {name: layout.runtime_name(name) for name in self.source.infos}
        return {name: parameters[path] for name, path in paths.items() if path in parameters}

    @property
    def files(self) -> list[PlannedFile]:
        """The shards, with the names and element types of the source."""
        return plan_model(list(self.source.infos.values()), parse_size(_SHARD_SIZE))

    def write_weights(self, staged: StagedOutput) -> None:
        """Write the shards."""
        parameters = self._parameters_by_tensor()
        for file in self.files:
            for info in file.infos:
                if info.name in parameters:
                    tensor = parameters[info.name].detach()
                else:
                    tensor = self.source.read(info.name)
                stored = tensor.to("cpu", torch_dtype(info.dtype)).contiguous()
                _write_tensor(staged, file.path, info.name, stored)

    def write_sidecars(self, directory: Path) -> None:
        """Copy the sidecars of the source, and write the index."""
        complete_checkpoint(
            self.start.weights, directory, self.files, was_decoded=self.start.model.is_decoded
        )

    def manifest(self, options: TrainOptions, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of a fine-tuned checkpoint."""
        return Manifest(
            kind="finetuned",
            layout=self.start.layout,
            method=self.start.method,
            base=self.start.base,
            options=options.shaping(),
            training=recorded_training(staged.path, options.shaping(), None, self.prompt_format),
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )
