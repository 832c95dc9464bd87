"""Tars by webdataset's rules, in both directions, and packs that a bare transformers model learns from."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLForConditionalGeneration

from data_pipelines.config import MediaConfig
from data_pipelines.loader import PackLoader
from data_pipelines.pack.bare import transformers_inputs
from data_pipelines.shards.storage import open_shard
from data_pipelines.shards.tar import scan_tar
from qwen2vl_train.export import save_processing
from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise, model_tensors, save_hf

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def write_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


word = st.text("abcXYZ019_-é 你", min_size=1, max_size=12)
key = st.lists(word, min_size=1, max_size=3).map("/".join)
suffix = st.sampled_from(["json", "jpg", "0.jpg", "1.PNG", "txt", "cls", "seg.png"])


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(key, st.lists(suffix, min_size=1, unique=True), min_size=1, max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.booleans(),
)
def test_a_scan_finds_the_samples_that_webdataset_reads(tmp_path_factory, samples, tar_format, junk):
    members = [
        (f"{key}.{suffix}", f"{key}{suffix}{number}".encode() * number)
        for number, (key, names) in enumerate(samples.items())
        for suffix in names
    ]
    if junk:  # macOS leaves such files between the real ones
        members.insert(1, ("._hidden.jpg", b"junk"))
    path = write_tar(tmp_path_factory.mktemp("tar") / "t.tar", members, tar_format)
    theirs = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        theirs[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    file = open_shard(str(path))
    scan = scan_tar(file)
    ours = {
        sample.key: {name: file.read(member.offset, member.size) for name, member in sample.members.items()}
        for sample in scan.samples
    }
    file.close()
    assert scan.problems == []
    assert ours == {key: members for key, members in theirs.items() if members}


def test_our_shards_go_through_webdatasets_own_decoding_and_torchs_loader(tiny):
    shards = sorted(str(path) for path in tiny.folder.glob("pictures-*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode(
        "torchrgb8", handler=webdataset.reraise_exception
    )
    loader = torch.utils.data.DataLoader(dataset.to_tuple("json", "0.png"), batch_size=None)
    samples = list(loader)
    assert len(samples) == 20
    for record, picture in samples:
        facts = record["media"]["0.png"]
        assert picture.shape == (3, facts["height"], facts["width"])


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
    file = open_shard(str(tmp_path / "t.tar"))
    (problem,) = scan_tar(file).problems
    assert "decompress it" in str(problem)


@pytest.fixture(scope="module")
def bare(tiny, tmp_path_factory):
    """A folder with `model`, as an export leaves it, and `shards`."""
    folder = tmp_path_factory.mktemp("bare")
    special = tiny.tokenizer.special
    config = ModelConfig(
        VisionConfig(2, 32, 2),
        TextConfig(tiny.tokenizer.vocab_size, 64, 96, 2, 4, 2, mrope_section=(2, 3, 3)),
    ).with_token_ids(special)
    model = Qwen2VL(config)
    initialise(model, 0, std=0.1)
    save_hf(model_tensors(model), folder / "model", config, torch.float32)
    save_processing(folder / "model", tiny.tokenizer, MediaConfig())
    (folder / "shards").mkdir()
    for shard in tiny.folder.glob("*.tar"):
        (folder / "shards" / shard.name).symlink_to(shard)
    return folder, model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bare_transformers_model_has_our_models_loss_on_every_pack(tiny, bare, attention):
    folder, ours = bare
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model", attn_implementation=attention)
    loader = PackLoader(tiny.config(max_tokens=256), tiny.tokenizer, 1, 0, 1, seed=0)
    kinds = set()
    for _, (pack,) in zip(range(6), loader, strict=False):  # the loader has no end
        kinds.add((pack.dummy_vision, len(pack.keys) > 1))
        with torch.no_grad():
            loss = theirs(**transformers_inputs(pack)).loss
            assert loss.item() == pytest.approx(ours(pack).loss_sum.item() / pack.num_supervised, rel=1e-5)
    assert (False, True) in kinds  # pictures, several documents to keep apart


def test_the_documented_example_runs(bare, monkeypatch):
    folder, _ = bare
    section = DOCS.read_text(encoding="utf-8").partition("## The loader alone")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 11
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, str(DOCS), "exec"), names)
    gradient = names["model"].get_input_embeddings().weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert names["step"] == 2
