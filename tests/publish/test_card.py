"""The card of every kind: its front matter, its warnings, and its code, which is executed."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from svdconvert import (
    ConvertOptions,
    LoraOptions,
    Run,
    SplitOptions,
    TrainOptions,
    convert,
    decompose,
    merge,
    read_manifest,
    to_lora,
    train,
)
from svdconvert.manifest.schema import training_of
from svdconvert.publish.card import inherited_entries, is_untouched
from svdconvert.training.data.prompts import ALPACA
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.publish.test_upload import PUSH
from tests.reading import readable, write_sums
from tests.rwkv6 import random_model, save
from tests.stock import TOKENS, adapted, logits, plain
from tests.training.small_runs import json_lines
from tests.visitor import Visitor

RUN = Run(device="cpu")
EVALUATED = {"eval_rows": 2, "eval_every": 1, "samples": 1, "sample_tokens": 4}


@pytest.fixture(scope="module")
def made(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of every kind, made from one base."""
    directory = tmp_path_factory.mktemp("made")
    base = readable(checkpoint("llama", dtype=torch.float32), directory / "base")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n"
    )
    (base / "LICENSE").write_text("Do as you like.")
    decompose(base, directory / "pissa", SplitOptions(rank=4), RUN)
    decompose(base, directory / "start", SplitOptions(rank=4, method="lora"), RUN)
    decompose(base, directory / "sorsa", SplitOptions(rank=4, method="sorsa"), RUN)
    plan = TrainOptions(
        data=str(write_sums(directory / "sums.jsonl")), steps=4, max_length=48, lr=0.01, **EVALUATED
    )
    train(directory / "pissa", directory / "trained", plan, RUN)
    to_lora(directory / "trained", directory / "lora", LoraOptions(rank=3))
    merge(directory / "trained", directory / "merged", run=RUN)
    train(base, directory / "full", plan, RUN, split=SplitOptions(method="full"))
    return directory


@pytest.fixture(scope="module")
def alice(made: Path) -> Iterator[Visitor]:
    """A user who has published every directory as alice/<its name>."""
    with Hub(made / "store") as hub:
        hub.create("org/base", made / "base")
        base, residual = {"base": "org/base"}, {"residual": "alice/pissa"}
        places = {name: base for name in ("pissa", "start", "sorsa", "lora", "merged", "full")}
        places["trained"] = base | residual
        visitor = Visitor(hub, made / "alice")
        pushes = [(str(made / name), f"alice/{name}", {}, given) for name, given in places.items()]
        said = visitor.runs(PUSH.format(pushes=pushes))
        assert [type(one) for one in said] == [list] * len(places), said
        yield visitor


@pytest.fixture(scope="module")
def published(alice: Visitor) -> dict[str, str]:
    """The cards by name."""
    names = ("pissa", "start", "sorsa", "trained", "lora", "merged", "full")
    return {name: alice.hub.repositories[f"alice/{name}"].read("README.md").decode() for name in names}


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def code(card: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL))


def test_the_losses_of_a_training_run_are_published_with_it(alice: Visitor, made: Path) -> None:
    for name, directory in (("trained", made / "trained"), ("full", made / "full")):
        sent = alice.hub.repositories[f"alice/{name}"].read("metrics.jsonl")
        assert sent == (directory / "metrics.jsonl").read_bytes()


def test_the_code_of_every_card_loads_the_right_model(
    alice: Visitor, published: dict[str, str], made: Path
) -> None:
    programs = {name: code(card) for name, card in published.items() if name != "sorsa"}
    assert all(programs.values())
    loaded = alice.runs(
        f"import torch\ntokens = torch.tensor({TOKENS.tolist()})\nresult = {{}}\n"
        f"for name, program in {programs!r}.items():\n"
        "    names = {}\n"
        "    exec(program, names)\n"
        "    with torch.no_grad():\n"
        "        result[name] = names['model'].eval()(input_ids=tokens).logits.float().tolist()\n"
    )
    base, trained = logits(plain(made / "base")), logits(adapted(made / "pissa", made / "trained"))
    wanted = {
        "pissa": base,
        "start": base,
        "trained": trained,
        "merged": trained,
        "lora": logits(adapted(made / "base", made / "lora")),
        "full": logits(plain(made / "full")),
    }
    assert loaded.keys() == wanted.keys()
    for name, found in loaded.items():
        assert (torch.tensor(found) - wanted[name]).abs().max() < 1e-4, name
    assert (trained - base).abs().max() > 1e-3


def test_the_front_matter_is_right_for_each_kind(published: dict[str, str]) -> None:
    licence = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    adapter = {"base_model_relation": "adapter", "library_name": "peft", **licence}
    weights = {"base_model_relation": "finetune", "library_name": "transformers", **licence}
    generates = {"pipeline_tag": "text-generation"}
    # No relation to the base is right for weights that do not work by themselves.
    residual = {"library_name": "transformers", **licence}
    tags = {
        "pissa": ["pissa", "residual-base", "svdconvert"],
        "start": ["decomposed-adapter", "lora", "svdconvert"],
        "sorsa": ["residual-base", "sorsa", "svdconvert"],
        "trained": ["pissa", "svdconvert", "trained-adapter"],
        "lora": ["lora", "pissa", "svdconvert"],
        "merged": ["merged", "pissa", "svdconvert"],
        "full": ["finetuned", "full", "svdconvert"],
    }
    kinds = {
        "pissa": residual,
        "start": {"base_model": "org/base", **adapter},
        "sorsa": residual,
        "trained": {"base_model": "alice/pissa", **adapter, **generates},
        "lora": {"base_model": "org/base", **adapter, **generates},
        "merged": {"base_model": "org/base", **weights, **generates},
        "full": {"base_model": "org/base", **weights, **generates},
    }
    assert {name: front(card) for name, card in published.items()} == {
        name: {**kind, "tags": tags[name]} for name, kind in kinds.items()
    }


def test_a_card_warns_of_wrong_uses(published: dict[str, str]) -> None:
    assert "**Not a model to be used by itself.** 14 matrices" in published["pissa"]
    assert "**It is wrong on the base itself**" in published["trained"]
    assert "stock PEFT does not know this kind of adapter" in published["sorsa"]
    assert "svdconvert train alice/sorsa" in published["sorsa"]
    assert "all of whose weights were trained" in published["full"]
    assert "adapter merged" not in published["full"]
    assert "untrained, it changes nothing" in published["start"]


def test_a_card_has_numbers_and_the_command(published: dict[str, str], made: Path) -> None:
    assert "| matrices | 14 |" in published["pissa"] and "| rank | 4 |" in published["pissa"]
    assert re.search(r"\| share of the base in the adapter \| \d+\.\d% \|", published["pissa"])
    assert re.search(r"\| loss \| \d\.\d+ to \d\.\d+ \|", published["trained"])
    assert re.search(r"\| update as stored \| cosine \d\.\d+ .* of it kept \|", published["merged"])
    assert re.search(r"\| left out of the change \| \d+\.\d\d% of its norm \|", published["lora"])
    commands = {
        name: re.findall(r"^svdconvert .* --push .*$", card, re.M) for name, card in published.items()
    }
    at = re.search(r"org/base@[0-9a-f]{40}", commands["pissa"][0])
    assert at is not None
    assert commands == {
        "pissa": [f"svdconvert decompose {at[0]} --rank 4 -o pissa --push alice/pissa"],
        "start": [f"svdconvert decompose {at[0]} --method lora --rank 4 -o start --push alice/start"],
        "sorsa": [f"svdconvert decompose {at[0]} --method sorsa --rank 4 -o sorsa --push alice/sorsa"],
        "trained": commands["trained"],
        "full": commands["full"],
        "lora": ["svdconvert to-lora TRAINED --rank 3 -o lora --push alice/lora"],
        "merged": ["svdconvert merge TRAINED -o merged --push alice/merged"],
    }
    assert "--penalty" not in commands["trained"][0] + commands["full"][0]
    assert re.match(r"svdconvert train alice/pissa@[0-9a-f]{40} --data sums.jsonl ", commands["trained"][0])
    assert commands["full"][0].startswith(f"svdconvert train {at[0]} --method full --data sums.jsonl ")
    assert str(made) not in "".join(published.values())


TRAINED = ("trained", "lora", "merged", "full")


def test_the_card_of_what_was_trained_tells_how_and_on_which_prompt(published: dict[str, str]) -> None:
    for name in TRAINED:
        card = published[name]
        assert "| data | sums.jsonl |" in card and "| steps | 4 |" in card
        assert "| learning rate | 0.01 |" in card
        assert re.search(r"^loss +[▁▂▃▄▅▆▇█]{4}  \d\.\d{4} to \d\.\d{4}$", card, re.MULTILINE)
        assert re.search(r"^held-out +[▁▂▃▄▅▆▇█]{5}  ", card, re.MULTILINE)
        assert "### Instruction:\n{prompt}\n\n### Response:\n```" in card
        assert "the answer before training and the answer after it" in card
        assert "max_new_tokens" in code(card)
        assert ("all weights" if name == "full" else "pissa, rank 4") in card
    for name in published.keys() - {*TRAINED}:
        assert "## Training" not in published[name] and "max_new_tokens" not in code(published[name])


def test_the_training_stays_known_in_what_is_made_of_the_adapter(made: Path) -> None:
    known = read_manifest(made / "trained").training
    assert known is not None and known.rank == 4 and known.prompt == ALPACA
    assert [sample.prompt for sample in known.samples] == [
        line["prompt"] for line in json_lines(made / "trained" / "samples.jsonl")[:1]
    ]
    merge(made / "lora", made / "again", run=RUN)
    for name in ("lora", "merged", "again"):
        assert read_manifest(made / name).training == known


def test_a_directory_from_before_the_training_was_recorded_tells_it_from_its_measurements(
    made: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(made / "trained", tmp_path / "old")
    values = json.loads((old / "svdconvert.json").read_text())
    recorded = values.pop("training")
    (old / "svdconvert.json").write_text(json.dumps(values))
    found = training_of(old, read_manifest(old))
    assert found is not None and found.prompt is None
    assert json.loads(json.dumps(asdict(found))) == recorded | {"prompt": None}


def test_a_card_that_was_edited_is_told_from_one_that_was_not(published: dict[str, str]) -> None:
    for card in published.values():
        assert is_untouched(card)
        assert not is_untouched(card.replace("## Load it", "## Use it"))
        assert not is_untouched(card + "More.\n")


def test_the_card_of_an_rwkv_loads_it_with_the_rwkv_package_or_with_remote_code(
    hub: Hub, tmp_path: Path
) -> None:
    weights = save(random_model(), tmp_path / "small.pth")
    convert(weights, tmp_path / "hf", ConvertOptions(layout="hf"))
    convert(tmp_path / "hf", tmp_path / "pth", ConvertOptions(layout="blinkdl"))
    visitor = Visitor(hub, tmp_path / "alice")
    pushes = [(str(tmp_path / name), f"alice/{name}", {}, {}) for name in ("hf", "pth")]
    said = visitor.runs(PUSH.format(pushes=pushes))
    assert [type(one) for one in said] == [list, list], said
    cards = {name: hub.repositories[f"alice/{name}"].read("README.md").decode() for name in ("hf", "pth")}
    assert "configuration_rwkv6.py and modeling_rwkv6.py of a released model" in cards["hf"]
    assert "trust_remote_code=True" in code(cards["hf"])
    assert 'RWKV(hf_hub_download("alice/pth", "model.pth"), "cpu fp32")' in code(cards["pth"])
    assert front(cards["pth"]) == {"tags": ["converted", "svdconvert"]}
    assert hub.repositories["alice/pth"].read("model.pth") == (tmp_path / "pth" / "model.pth").read_bytes()


@pytest.mark.parametrize("card", ["", "# no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n"])
def test_a_base_without_a_readable_card_has_no_known_licence(card: str) -> None:
    assert inherited_entries(card) == {}
