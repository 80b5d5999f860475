"""Put residuals into a network that was loaded with the weights of the base."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svdconvert.manifest.place import Rows
from svdconvert.manifest.schema import Matrix
from svdconvert.models.matrices import is_conv1d
from svdconvert.training.model.quantised_linear import QuantisedWeight
from svdconvert.training.model.quantised_loading import densify_layer, keep_quantised


def replace_weights(
    model: nn.Module,
    residuals: Mapping[str, Tensor | QuantisedWeight],
    matrices: Mapping[str, Matrix],
    paths: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    """Copy `residuals`, by the names of their tensors, into the network; the dtype of each weight stays.

    `matrices` says where each one belongs, and `paths` has the path in the network of each module. A layer
    whose residual is quantised is replaced by one that keeps it so; a quantised one whose residual is not, by
    a plain one in `dtype`, that of the other weights, or as it is read if that is None.
    """
    for name, stored in residuals.items():
        matrix = matrices[name]
        if isinstance(stored, QuantisedWeight):
            keep_quantised(model, paths[matrix.module], stored)
            continue
        place = matrix.place
        has_module = place is None or place.expert is None
        path = paths[matrix.module] if has_module else place.module if place else ""
        densify_layer(model, path, dtype)
        module = model.get_submodule(path)
        weight = module.get_parameter("weight" if has_module or place is None else place.name).detach()
        target = weight if place is None or place.expert is None else weight[place.expert]
        if is_conv1d(module) or (target is not weight and getattr(module, "is_transposed", False)):
            target = target.mT
        rows = Rows(0, len(target)) if place is None or place.rows is None else place.rows
        with torch.no_grad():
            target[rows.slice].copy_(stored.mT if place is not None and place.transposed else stored)
