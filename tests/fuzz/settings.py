"""Targets that a user writes or the network sends: recipes, .env, sizes, names of models, answers, cards."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from unittest import mock

import huggingface_hub
import yaml
from huggingface_hub.utils import httpx
from pydantic import TypeAdapter

from svdconvert.config.experiment import OWN_KEYS
from svdconvert.config.options import SplitOptions
from svdconvert.config.recipe import SECTIONS, Recipe, options, read_recipe
from svdconvert.config.sizes import parse_size
from svdconvert.errors import CheckpointError, RecipeError
from svdconvert.hub.auth import find_token, scrub
from svdconvert.hub.download import _known_files
from svdconvert.hub.errors import hub_errors_as
from svdconvert.hub.reference import ModelRef
from svdconvert.hub.replies import check_commit, check_range, check_reply, is_commit
from svdconvert.manifest.training import Training, recorded_training
from svdconvert.publish.card import inherited_entries, is_untouched
from svdconvert.training.logs.metrics import JsonLinesFile
from tests.fuzz.mutate import change_json, change_lines, change_text
from tests.fuzz.target import Target

RECIPES = sorted((Path(__file__).resolve().parents[2] / "svdconvert" / "recipes").glob("*.yaml"))


def _read_recipe(raw: bytes, directory: Path) -> None:
    """As yaml reads it, with spellings made equal; then the options of every command."""
    path = directory / "recipe.yaml"
    path.write_bytes(raw)
    recipe = read_recipe(path)
    known = yaml.safe_load(raw.decode()) or {}
    keys = {str(key).replace("-", "_") for key in known}
    assert keys - {*OWN_KEYS} == {*recipe.shared} | {*recipe.sections} & keys
    refusals = [error for kind in SECTIONS.values() if (error := _refusal_of(kind, recipe))]
    if refusals:
        raise refusals[0]


def _refusal_of(kind: type, recipe: Recipe) -> RecipeError | None:
    try:
        options(kind, recipe, {"layout": "hf"} if kind is SECTIONS["convert"] else {})
    except RecipeError as error:
        assert len(str(error)) < 2000, "the sentence repeats the input"
        return error
    return None


def _read_options(raw: bytes, directory: Path) -> None:
    """Options as they are typed."""
    try:
        typed = json.loads(raw)
    except (ValueError, RecursionError):
        return
    if isinstance(typed, dict):
        made = options(SplitOptions, Recipe(), {str(key): value for key, value in typed.items()})
        assert made.rank >= 1 and made.targets


def _read_dotenv(raw: bytes, directory: Path) -> None:
    """The token, which is then kept out of messages."""
    (directory / ".env").write_bytes(raw)
    with mock.patch("svdconvert.hub.auth.DOTENV", directory / ".env"), mock.patch.dict("os.environ"):
        token = find_token()
        assert token is None or (token and token not in scrub(f"<{token}>") or len(token) < 4)


def _read_size(raw: bytes, directory: Path) -> None:
    """Bytes as the digits and the unit say."""
    text = raw.decode("utf-8", "surrogateescape")
    try:
        size = parse_size(text)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    assert found is not None
    letters = found[2].lower()
    power = "kmgtpe".find(letters[:1]) + 1 if letters[:1] not in ("", "b") else 0
    unit = (1024 if letters[1:2] == "i" else 1000) ** power
    assert abs(size - Fraction(found[1]) * unit / (8 if letters.endswith("bit") else 1)) <= max(
        1, Fraction(size, 2**50)
    )


def _read_reference(raw: bytes, directory: Path) -> None:
    """A model's name as it is typed or as a manifest has it."""
    text = raw.decode("utf-8", "surrogateescape")
    reference = ModelRef.parse(text)
    if reference.path is None:
        with hub_errors_as(CheckpointError, "it"):
            huggingface_hub.utils.validate_repo_id(reference.repository)
        assert "@" not in f"{reference.repository}{reference.file}{reference.revision}"


def _read_reply(raw: bytes, directory: Path) -> None:
    """An answer to a request for a range."""
    try:
        said = json.loads(raw)
        headers = [(str(key).encode(), str(value).encode()) for key, value in said["headers"].items()]
        status = int(said["status"]) % 1000
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return
    request = httpx.Request("GET", "https://hub/api/models/org/x")
    response = httpx.Response(status, headers=headers, request=request)
    with hub_errors_as(CheckpointError, "org/x"):
        check_reply(response)
        check_commit(response, "org/x", "a" * 40)
        assert check_range(response, "org/x", 0, 1000, None) > 0


def _read_model_info(raw: bytes, directory: Path) -> None:
    """What the Hub says a repository holds."""
    with _answering(raw), hub_errors_as(CheckpointError, "org/x"):
        found = _known_files("org/x", None)
    assert found is not None and is_commit(found[0])
    assert not any(".." in name.split("/") or name.startswith("/") for name in found[1])


@contextmanager
def _answering(raw: bytes) -> Iterator[None]:
    """Every request of huggingface_hub is answered with these bytes."""
    headers = {"Content-Type": "application/json"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=raw, headers=headers))
    with (
        httpx.Client(transport=transport) as client,
        mock.patch("huggingface_hub.utils._http._GLOBAL_CLIENT", client),
    ):
        yield


def _read_card(raw: bytes, directory: Path) -> None:
    """The licence of a card."""
    (directory / "README.md").write_bytes(raw)
    text = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    is_untouched(text)
    json.dumps(inherited_entries(text))


def _read_metrics(raw: bytes, directory: Path) -> None:
    """The measurements of a run that goes on after step 2, and of one that is published."""
    path = directory / "metrics.jsonl"
    path.write_bytes(raw)
    found = recorded_training(directory, {}, None)
    assert (
        TypeAdapter(Training).validate_json(json.dumps(asdict(found), allow_nan=False)).steps == found.steps
    )
    with JsonLinesFile(path, 2):
        pass
    assert all(json.loads(line)["step"] <= 2 for line in path.read_text(encoding="utf-8").split("\n")[:-1])


_YAML = [
    "!!int ",
    "!!timestamp ",
    "!!binary ",
    "!!bool x",
    "!!python/object/apply:os.system [id]",
    "!!set ",
    "!!float x",
    "&a ",
    "*a",
    "&a [*a, *a]",
    "<<: *a",
    "? ",
    "- ",
    "---\n",
    "2020-13-45",
    "0b",
    "0x_",
    "1:99999999999",
    ".inf",
    "{a: " * 300,
    "[" * 3000,
    "'",
    "|",
    "%YAML 9.9",
    "\t",
    "decompose: {rank: ",
    "steps: ",
]
_INFO = {
    "id": "org/x",
    "sha": "b" * 40,
    "lastModified": "2024-01-01T00:00:00.000Z",
    "siblings": [
        {"rfilename": "config.json", "size": 2, "blobId": "c" * 40},
        {
            "rfilename": "model.safetensors",
            "size": 9,
            "lfs": {"sha256": "d" * 64, "size": 9, "pointerSize": 1},
        },
    ],
    "cardData": {"license": "mit"},
    "config": {"model_type": "llama"},
}
_RANGE = {
    "status": 206,
    "headers": {"Content-Range": "bytes 0-999/5000", "X-Repo-Commit": "a" * 40, "Content-Length": "1000"},
}
_BUSY = {
    "status": 429,
    "headers": {"Retry-After": "3", "RateLimit": '"api";r=0;t=33', "Content-Type": "text/html"},
}
_TYPED = {
    "method": "pissa",
    "rank": 16,
    "alpha": 1.5,
    "rank_pattern": "attn=16,mlp.down=64",
    "alpha_pattern": "attn=2.5",
    "targets": "attn,mlp",
    "tol": 0.001,
    "max_shard_size": "5GB",
    "rslora": True,
    "seed": 0,
    "dtype": "float32",
}
_METRICS = (
    b'{"step": 1, "loss": 2.5, "lr": 0.001}\n{"step": 2, "eval_loss": 2.0, "perplexity": 7.3}\n'
    b'{"step": 2, "loss": 2.25}\n{"step": 3, "loss": 2.125}\n'
)
_CARD = b"---\nlicense: apache-2.0\nlicense_link: https://x\nbase_model: org/x\n---\n# A model\n"

TARGETS = {
    "recipe": Target(
        _read_recipe,
        change_text(_YAML),
        share=5,
        seeds=[path.read_bytes() for path in RECIPES],
    ),
    "options": Target(_read_options, change_json, share=15, seeds=[json.dumps(_TYPED).encode()]),
    "dotenv": Target(
        _read_dotenv,
        change_text(["${HF_TOKEN}", "${", "export ", "'", '"', "\\x", "\\N{", "=", "#", "hf=", "HF_TOKEN"]),
        share=15,
        seeds=[b"HF_TOKEN=hf_aaaaaaaaaaaa\n", b"# mine\nexport hf='hf_x' # note\nOTHER=${HF_TOKEN:-1}\n"],
    ),
    "size": Target(
        _read_size,
        change_text(["9", "." * 9, "e9", "GB", "KiB", "bit", "0", " ", "_", "-1", "9" * 400, "9" * 5000]),
        share=15,
        seeds=[b"5GB", b"200MB", b"4GiB", b"0.5 TB", b"123"],
    ),
    "reference": Target(
        _read_reference,
        change_text(["@", "/", ":", "//", "http://[", "%2e%2e", "%00", "/tree/main", "?", "#", ".pth", "."]),
        share=15,
        seeds=[
            b"org/name",
            b"org/name@main",
            b"gpt2",
            b"org/name/sub/x.pth@v1",
            b"https://huggingface.co/org/name/tree/main/sub",
            b"https://hf.co/org/name/blob/v1/x.pth",
        ],
    ),
    "reply": Target(_read_reply, share=15, seeds=[json.dumps(_RANGE).encode(), json.dumps(_BUSY).encode()]),
    "model-info": Target(_read_model_info, share=10, seeds=[json.dumps(_INFO).encode()]),
    "card": Target(_read_card, change_text(_YAML), share=4, seeds=[_CARD]),
    "metrics": Target(_read_metrics, change_lines, share=15, seeds=[_METRICS]),
}
