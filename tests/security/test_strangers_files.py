"""Files of strangers run no code, and neither read nor write outside their folders."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.fuzz.sources import captions_of, image_files, in_this_process
from helpers.squares import Squares
from torch import nn

from nami_lightning.conversion.weights import read_weights_file
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.sources import ImageFolder, WebDataset
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings
from nami_lightning.datamodules.storage.chunk_file import DamagedChunk
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.datamodules.storage.shards import INDEX
from nami_lightning.datamodules.storage.verify import verify
from nami_lightning.evaluation.prompts import check_id
from nami_lightning.runs.load import load_pipeline
from nami_lightning.runs.recipe import Recipe, check_name
from nami_lightning.runs.run_dir import load_weights, read_metadata
from nami_lightning.utils.shard_index import check_shards

BUCKET = "train/16/16x16"


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What code of a stranger would make."""
    return tmp_path / "harmed"


# --- weights and checkpoints -------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint in shards, with an optimizer's values that are no tensors."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    folder = tmp_path / "step=0000001.ckpt"
    state = {"state_dict": model.state_dict(), "optimizer_0": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_an_index_of_shards_runs_no_code(shards: Path, mark: Path) -> None:
    check_shards(shards)
    (shards / ".metadata").write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(ValueError, match=r"it names posix\.mkdir, which is no part of a checkpoint"):
        load_weights(shards, nn.Linear(3, 3), {"weight": "weight"})
    assert not mark.exists()


def test_a_value_in_shards_runs_no_code(shards: Path, mark: Path) -> None:
    index = pickle.loads((shards / ".metadata").read_bytes())
    place = next(place for place in index.storage_data if place.fqn.endswith(".lr"))
    file = shards / "__0_0.distcp"
    harmful = io.BytesIO()
    torch.save(Harmful(mark), harmful)
    info = index.storage_data[place]
    info.offset, info.length = file.stat().st_size, len(harmful.getvalue())
    file.write_bytes(file.read_bytes() + harmful.getvalue())
    (shards / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="can't be used"):
        check_shards(shards)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../other.distcp", "/dev/zero"])
def test_shards_lie_in_their_folder(shards: Path, name: str) -> None:
    index = pickle.loads((shards / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (shards / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="outside the folder"):
        check_shards(shards)


def test_other_weights_run_no_code_and_nobody_is_told_to(tmp_path: Path, mark: Path) -> None:
    for name, read in (("step=0000001.ckpt", read_metadata), ("weights.bin", read_weights_file)):
        torch.save({"a": Harmful(mark)}, tmp_path / name)
        with pytest.raises(ValueError, match="holds more than tensors and plain values, which could run code") as found:
            read(tmp_path / name)
        assert "weights_only" not in str(found.value)
    assert not mark.exists()


def test_a_pipelines_folder_runs_no_code(tmp_path: Path, mark: Path) -> None:
    code = f"import os\nos.mkdir({str(mark)!r})\nfrom diffusers import DiffusionPipeline, UNet2DModel\n"
    code += "class Mine(DiffusionPipeline): pass\nclass Part(UNet2DModel): pass\n"
    (tmp_path / "unet").mkdir()
    for file in ("pipeline.py", "unet/part.py"):
        (tmp_path / file).write_text(code)
    for index in (
        {"_class_name": ["pipeline", "Mine"]},
        {"_class_name": "DDPMPipeline", "unet": ["part", "Part"], "scheduler": ["diffusers", "DDPMScheduler"]},
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "0.38.0"}))
        with pytest.raises(FileNotFoundError, match="neither a run"):
            load_pipeline(str(tmp_path))
    assert not mark.exists()


# --- data sets ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    folder = tmp_path_factory.mktemp("squares") / "data"
    with in_this_process():
        return prepare(Squares(12, [(20, 20)]), folder, Preparation([16], heldout_percent=0, format="png"), workers=1)


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy, for a stranger."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def change(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["pickle", "no_header_tensor", "file"])
def test_a_data_sets_values_are_texts_and_bytes(data: Path, kind: str) -> None:
    change(data / BUCKET / INDEX, lambda index: index["config"].update(data_format=["str", kind, "str"]))
    with pytest.raises(DamagedChunk, match="not of str and bytes"):
        PreparedDataset(data).buckets("train")[0].shards.read([0])


def test_a_data_sets_items_are_plain_tuples(data: Path) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["config"]["data_spec"] = index["config"]["data_spec"].replace('"null"', '{"__enum__": true}', 1)

    change(data / BUCKET / INDEX, edit)
    with pytest.raises(DamagedChunk, match="does not say how it is to be read"):
        PreparedDataset(data).buckets("train")[0].shards.read([0])


@pytest.mark.parametrize("name", ["../../../../outside.bin", "/etc/passwd", "a/b.bin", "..bin", ".hidden.bin", "chunk"])
def test_chunks_lie_in_their_folder(data: Path, name: str) -> None:
    change(data / BUCKET / INDEX, lambda index: index["chunks"][0].update(filename=name))
    with pytest.raises(ValueError, match="is not a litdata index"):
        PreparedDataset(data).buckets("train")
    with in_this_process():
        assert verify(data, 1)


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero", "train/16/16x16/../../../../x.bin", "train/16/16x16/x"])
def test_checksums_are_of_chunks_in_the_folder(data: Path, name: str) -> None:
    change(data / "dataset.json", lambda description: description["checksums"].update({name: "0"}))
    with pytest.raises(ValueError, match="is damaged: its checksums"):
        verify(data, 1)


def test_a_remote_data_set_writes_into_its_cache_alone(data: Path, tmp_path: Path) -> None:
    change(data / BUCKET / INDEX, lambda index: index["chunks"][0].update(filename="../../../../outside.bin"))
    cache = CacheSettings(str(tmp_path / "cache"), "1GB")
    with pytest.raises(ValueError, match="is not a litdata index"):
        PreparedDataset(f"file://{data}", cache).buckets("train")
    assert not list(tmp_path.rglob("outside.bin"))


def test_a_device_in_place_of_a_file_is_not_read(data: Path) -> None:
    for file in (data / BUCKET / "000000-chunk-0-0.bin", data / BUCKET / INDEX):
        assert file.exists()
        file.unlink()
        file.symlink_to("/dev/zero")
        with in_this_process():
            assert verify(data, 1)
    (data / "dataset.json").unlink()
    (data / "dataset.json").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match="holds no finished data set"):
        PreparedDataset(data)


# --- archives, captions and names ----------------------------------------------------------------------


def test_a_tar_neither_writes_nor_reads_outside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    image = image_files()[0]
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            header = tarfile.TarInfo(name)
            header.type, header.linkname, header.size = kind, link, len(data)
            tar.addfile(header, io.BytesIO(data))

        for key in ("../out", "/tmp/nami_out", "a/../../out", "NUL"):
            add(f"{key}.png", image)
            add(f"{key}.txt", b"a caption")
        add("linked.png", image)
        add("linked.txt", b"", tarfile.SYMTYPE, str(tmp_path / "secret.txt"))
        add("device.png", b"", tarfile.CHRTYPE)
        add("device.txt", b"a caption")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    output = tmp_path / "data"
    with in_this_process():
        prepare(WebDataset(str(tmp_path / "in")), output, Preparation([16], heldout_percent=0), workers=1)
    assert {path for path in tmp_path.rglob("*") if path.is_file() and output not in path.parents} == before
    assert not Path("/tmp/nami_out.png").exists()
    assert captions_of(output).split("\n") == ["a caption"] * 4
    assert sorted(PreparedDataset(output).description["skipped"].values()) == [1, 1]


def test_links_and_rows_of_a_folder_do_not_lead_outside(tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "secret.png").write_bytes(image_files()[0])
    (images / "a.png").write_bytes(image_files()[0])
    (images / "a.txt").symlink_to("../secret.txt")
    (images / "a.caption").write_text("a caption")
    (images / "b.png").symlink_to("../secret.png")
    rows = [{"file_name": name, "text": "a secret"} for name in ("../secret.png", str(tmp_path / "secret.png"))]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with in_this_process():
        prepare(ImageFolder(str(images)), tmp_path / "data", Preparation([16], heldout_percent=0), workers=1)
    assert captions_of(tmp_path / "data") == "a caption"
    assert PreparedDataset(tmp_path / "data").description["skipped"] == {"outside the folder": 3}


@pytest.mark.parametrize(
    "name", ["..", "../x", "/etc", "a/b", "", "NUL", "com1.txt", "x" * 201, "a\n", "a\0", "\ud800"]
)
def test_ids_name_folders_in_place(name: str) -> None:
    with pytest.raises(ValueError, match="can't name a folder"):
        check_id(name, "line 1")


def test_a_long_id_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="can't name a folder"):
        check_id("a" * 2_000_000 + "/", "line 1")


@pytest.mark.parametrize("name", ["..", "../x", "/etc/x", "a/../../b", "", ".", "a//b", "x" * 201, "a\nb"])
def test_a_runs_folder_lies_below_output_dir(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a folder below output_dir"):
        check_name(name)
    check_name("sweeps/nami 2b.1")


# --- recipes -------------------------------------------------------------------------------------------


def test_a_recipe_does_not_grow_without_an_end(tmp_path: Path) -> None:
    layers = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    recipes = {
        "aliases": "\n".join(["a0: &a0 [x, x]", *layers]),
        "circle": "a: &a [*a]",
        "deep": "a: " + "[" * 5000,
        "date": "name: 2001-99-99",
    }
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: openmoji\n{text}\n")
        with pytest.raises(ValueError, match="is not YAML"):
            Recipe(tmp_path / f"{name}.yaml")


def test_looking_at_a_recipe_imports_only_the_classes_that_it_names(tmp_path: Path, mark: Path) -> None:
    """This is why the pages say to read a stranger's recipe first: naming a class imports its module."""
    (tmp_path / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (tmp_path / "recipe.yaml").write_text("base: openmoji\nname: a\n")
    Recipe(tmp_path / "recipe.yaml")
    assert not mark.exists()
    (tmp_path / "recipe.yaml").write_text("base: openmoji\nname: a\nmodel: {optimizer: {class_path: theirs.Mine}}\n")
    with pytest.raises(ValueError, match="theirs"):
        Recipe(tmp_path / "recipe.yaml")
    assert mark.exists()
