"""The shapes of a base's matrices, for adapters whose files do not store them."""

from dataclasses import dataclass, field
from pathlib import Path

from svdconvert.adapters.adapter_config import CONFIG
from svdconvert.errors import ArtifactError, ModelNotFoundError
from svdconvert.inputs.model import open_headers
from svdconvert.inputs.tensor_names import TensorNames, shape_of_shares
from svdconvert.output.sidecars import read_json_object


@dataclass
class BaseShapes:
    """Finds the shape of a module's matrix in the base, whose headers are read for the first one."""

    directory: Path
    """The adapter's."""
    given: str | None
    """The base's location, if the user gave one; else the one in the adapter's configuration is used."""
    trust_remote_code: bool = False
    """Let transformers run the code in the base's repository."""
    used: bool = False
    _names: TensorNames | None = field(default=None, init=False)

    def find(self, module: str) -> tuple[int, ...]:
        """(O, I) of a module. Raises ArtifactError if the base is not found, or has no such matrix."""
        self.used = True
        names = self._names or self._open()
        self._names = names
        shares = names.shares(module)
        shapes = [names.infos[share.tensor].shape for share in shares]
        if not shares or any(len(shape) != 2 for shape in shapes):  # noqa: PLR2004 (a matrix)
            raise ArtifactError(
                f"{self.directory} adapts {module}, which its base does not have as a matrix; give the model "
                "that it was made for with --base"
            )
        return shape_of_shares(names.infos, shares)

    def _open(self) -> TensorNames:
        named = self.given or read_json_object(self.directory / CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise self._absent("unknown")
        try:
            base = open_headers(named, trust_remote_code=self.trust_remote_code)
        except ModelNotFoundError as error:
            raise self._absent(named) from error
        layout = base.layout()[1]
        return TensorNames(layout, layout.divided(base.source).infos)

    def _absent(self, where: str) -> ArtifactError:
        return ArtifactError(
            f"{self.directory} does not store the shapes of the matrices that it adapts, and its base is not "
            f"found ({where}); give it with --base"
        )
