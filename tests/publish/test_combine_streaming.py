"""Checkpoints of the Hub are combined into a repository, without a copy of their weights on the disk."""

from pathlib import Path

import yaml

from svdconvert import CombineOptions, Run, combine
from tests import medium
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor


def test_three_checkpoints_of_the_hub_become_a_fourth(hub: Hub, alice: Visitor, tmp_path: Path) -> None:
    names = ("base", "one", "two")
    local = [
        medium.build(tmp_path / name, layers=4, hidden=128, wide=352, seed=seed)
        for seed, name in enumerate(names)
    ]
    for name, path in zip(names, local, strict=True):
        hub.create(f"org/{name}", path)
    repository = hub.create("alice/out")
    file = {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [{"model": f"org/{name}", "parameters": {"weight": 0.5}} for name in names[1:]],
        "parameters": {"density": 0.5},
    }
    alice.home.mkdir(exist_ok=True)
    (alice.home / "merge.yaml").write_text(yaml.safe_dump(file))
    said = alice.succeeds(
        *(
            "combine",
            "--config",
            "merge.yaml",
            "--stream",
            "--push",
            "alice/out",
            "--max-shard-size",
            "300KB",
        ),
        *("--threads", 1),
    )
    assert "pushed out to alice/out" in said.out
    assert not [path for path in alice.home.rglob("*.safetensors") if path.stat().st_size > 1000]
    options = CombineOptions(method="ties", weights=(0.5, 0.5), density=0.5, max_shard_size="300KB")
    combine(local[1:], tmp_path / "out", options, Run(threads=1), base=str(local[0]))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards if repository.read(path.name) != path.read_bytes()] == []
    card = repository.read("README.md").decode()
    assert "svdconvert combine" in card
