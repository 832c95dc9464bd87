"""`qwen2vl-data stats`: the tables' numbers, names of data sets, and settings read from a run's folder."""

import json

import numpy as np
import pytest
import yaml

from data_pipelines.cli import main
from data_pipelines.loader import open_sources
from data_pipelines.report.data_run import name_sources, read_data_run
from data_pipelines.report.survey import fills, plan_packs, survey_sources


def as_yaml(tiny, path, **changes):
    settings = {
        "tokenizer": tiny.tokenizer.path,
        "data": {
            "sources": {"pictures": {"shards": [f"{tiny.folder}/pictures-*.tar"], "epochs": 1}},
            "plan": {"max_tokens": 192, "max_patches": 768, "pool_size": 6},
            "media": {"max_pixels": 28224},
        },
        **changes,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_tables_count_samples_tokens_and_sizes(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["stats", f"{tiny.folder}/*.tar", "--tokenizer", f"{tiny.folder}/tokenizer", "--max-tokens", "192"]
    assert main([*words, "--max-pixels", "28224"]) == 0
    shown = capsys.readouterr().out
    cells = {tuple(cell.strip() for cell in line.split("│")[1:4]) for line in shown.splitlines() if "│" in line}
    assert {("pictures", "caption", "20"), ("texts", "text", "15"), ("all", "", "35")} <= cells
    assert "Packs of 192 tokens and 768 patches (pool)" in shown
    assert "mean fill 9" in shown


def test_nothing_is_cut_at_eighty_columns(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    sets = [f"a_rather_long_name_of_a_data_set={tiny.folder}/pictures-*.tar", f"texts={tiny.folder}/texts-*.tar"]
    assert main(["stats", *sets, "--tokenizer", f"{tiny.folder}/tokenizer", "--max-tokens", "192"]) == 0
    shown = capsys.readouterr().out
    headings = ["samples", "share", "tokens", "5%", "median", "95%", "longest", "pictures", "5% … 95% megapixels"]
    assert [heading for heading in headings if f" {heading} " not in shown] == []
    assert max(len(line) for line in shown.splitlines() if "│" in line) <= 80
    assert "…" not in shown.replace(" … ", "")


def test_lengths_are_those_of_the_encoder(tiny):
    config = tiny.config()
    sources = open_sources(config, tiny.tokenizer)
    survey = survey_sources(sources, config)
    pictures = next(group for group in survey.groups if group.dataset == "pictures")
    from data_pipelines.encode.sample import SampleEncoder

    encoder = SampleEncoder(tiny.tokenizer, config.template, config.media, config.plan.max_tokens)
    for (shard, row), tokens in zip(pictures.places.tolist(), pictures.tokens.tolist(), strict=True):
        record, read = sources[0].read(shard, row)
        assert encoder.encode(record, read)[0].input_ids.shape[0] == tokens
    assert (survey.num_samples, survey.left_out) == (35, 0)
    assert survey.num_tokens == sum(int(group.tokens.sum()) for group in survey.groups)


def test_what_does_not_fit_is_listed_with_its_reason(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["stats", f"{tiny.folder}/pictures-*.tar", "--tokenizer", f"{tiny.folder}/tokenizer", "--max-tokens", "20"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Left out or noted" in shown
    assert "too_long" in shown


def test_one_pass_is_planned_and_its_fill_measured(tiny, tmp_path):
    run = read_data_run(as_yaml(tiny, tmp_path / "data.yaml"))
    sources = open_sources(run.data, tiny.tokenizer)
    survey = survey_sources(sources, run.data)
    packs = plan_packs(sources, run, survey.num_tokens, 1000)
    assert abs(sum(pack.num_tokens for pack in packs) - survey.num_tokens) < 192
    full = fills(packs, run.data)
    assert np.allclose(full, [pack.num_tokens / 192 for pack in packs])  # 4 patches a token at most: tokens bind
    assert len(plan_packs(sources, run, survey.num_tokens, 3)) == 3
    assert plan_packs(sources, run, 0, 3) == []


def test_data_sets_are_named_by_file_by_folder_or_by_hand(tmp_path):
    for name in (
        "train/coco-00000.tar",
        "train/coco-00001.tar",
        "held/coco-00000.tar",
        "web/00012.tar",
        "train/ocr.tar",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = name_sources([f"{tmp_path}/train/*.tar", f"{tmp_path}/held/*.tar", f"{tmp_path}/web/*.tar"])
    assert {name: len(shards) for name, shards in named.items()} == {
        "train/coco": 2,
        "held/coco": 1,
        "web": 1,
        "ocr": 1,
    }
    assert list(name_sources([f"mine={tmp_path}/train/*.tar"])) == ["mine"]


def test_settings_come_from_a_runs_folder(tiny, tmp_path):
    plain = yaml.safe_load(as_yaml(tiny, tmp_path / "data.yaml").read_text())
    stage = {"data": plain["data"], "packs_per_step": 6, "steps": 10}
    config = {"seed": 3, "data": {"tokenizer": plain["tokenizer"]}, "stages": {"vision": stage, "instruct": stage}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 2}))
    run = read_data_run(tmp_path, "vision")
    assert (run.seed, run.packs_per_step, run.world, run.data.plan.max_tokens) == (3, 6, 2, 192)
    with pytest.raises(ValueError, match="vision, instruct"):
        read_data_run(tmp_path)
    with pytest.raises(ValueError, match="multiple of world=4"):
        read_data_run(tmp_path, "vision", world=4)


def test_wrong_settings_end_in_one_line(tiny, tmp_path, capsys):
    assert main(["stats"]) == 2
    assert "give shards" in capsys.readouterr().err
    assert main(["stats", "--config", f"{tmp_path}/none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err
    as_yaml(tiny, tmp_path / "data.yaml", sed=3)
    assert main(["stats", "--config", f"{tmp_path}/data.yaml"]) == 2
    assert "sed" in capsys.readouterr().err
    (tmp_path / "alone-0.tar").touch()
    assert main(["stats", f"{tmp_path}/alone-0.tar"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
