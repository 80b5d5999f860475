"""Names from foreign files stay in their directory, and links are followed inside it only."""

from pathlib import Path

import pytest

from svdconvert.checkpoint.file_names import is_known_kind, leads_outside, name_fault

PLAIN = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "pissa_init/adapter_model.safetensors",
    "a..b.json",
    "ä ö.txt",
    "x" * 255,
]
ODD = {
    "": "no plain name",
    "a//b": "no plain name",
    "a/./b": "no plain name",
    "a/": "no plain name",
    "/etc/passwd": "absolute",
    "//host/share": "no plain name",
    "C:/x": "absolute",
    "..": "leaves",
    "../x": "leaves",
    "a/../b": "leaves",
    "a/..": "leaves",
    ".": "hidden",
    "./x": "hidden",
    ".env": "hidden",
    "a/.ssh/id_rsa": "hidden",
    "...": "hidden",
    "a\\b": "backslash",
    "..\\x": "hidden",
    "a\0b": "control",
    "a\nb": "control",
    "a\x1b[2J": "control",
    "a\u202eb": "control",
    "\ud800": "control",
    "x" * 256: "longer",
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_has_no_fault(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_leaves_its_directory_is_hidden_or_unprintable_has_a_fault(name: str) -> None:
    assert ODD[name] in str(name_fault(name))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("model.safetensors", True),
        ("a/adapter_config.json", True),
        ("rwkv_vocab_v20230424.txt", True),
        ("LICENSE", True),
        ("id_rsa", False),
        ("shadow", False),
        ("key.pem", False),
        ("a.json/passwd", False),
    ],
)
def test_kinds_of_files_are_known_by_the_last_part_of_their_name(name: str, known: bool) -> None:
    assert is_known_kind(name) == known


def test_links_are_followed_inside_the_directory_and_into_the_blobs_of_a_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "commit"
    (snapshot / "sub").mkdir(parents=True)
    blobs = repository / "blobs"
    blobs.mkdir()
    targets = {
        "inside": snapshot / "real",
        "blob": blobs / "abc",
        "outside": tmp_path / "id_rsa",
        "other_snapshot": repository / "snapshots" / "other",
        "other_blobs": tmp_path / "models--org--else" / "blobs" / "abc",
        "nothing": tmp_path / "nothing",
    }
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if name != "nothing":
            target.write_text("x")
        (snapshot / "sub" / name).symlink_to(target)
    (snapshot / "loop").symlink_to(snapshot / "loop")
    (snapshot / "twice").symlink_to(snapshot / "sub" / "outside")
    inside = {name for name in targets if not leads_outside(snapshot / "sub" / name, snapshot)}
    assert inside == {"inside", "blob"}
    assert leads_outside(snapshot / "loop", snapshot) and leads_outside(snapshot / "twice", snapshot)


def test_blobs_that_are_themselves_a_link_or_of_no_cache_are_outside(tmp_path: Path) -> None:
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "id_rsa").write_text("secret")
    for repository in ("models--org--name", "my-models"):
        snapshot = tmp_path / repository / "snapshots" / "commit"
        snapshot.mkdir(parents=True)
        (tmp_path / repository / "blobs").symlink_to(tmp_path / "ssh")
        (snapshot / "config.json").symlink_to(tmp_path / repository / "blobs" / "id_rsa")
        assert leads_outside(snapshot / "config.json", snapshot)


def test_a_model_that_is_opened_through_a_link_is_the_directory_that_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not leads_outside(tmp_path / "link" / "config.json", tmp_path / "link")
