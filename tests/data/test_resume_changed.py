"""A run that goes on with other data: refused without the flag, exact where nothing changed, told where it restarts."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from data_pipelines.loader import PackLoader
from data_pipelines.plan.rows import unfold

STEPS, PACKS = 6, 4


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny shards that a test may change."""
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path)
    return tmp_path


def make(tiny, folder, packing="pool", **weights):
    config = tiny.config(**(weights or {"pictures": 2.0, "texts": 1.0}))
    sources = {name: replace(source, shards=(f"{folder}/{name}-*.tar",)) for name, source in config.sources.items()}
    config = replace(config, sources=sources, plan=replace(config.plan, packing=packing))
    return PackLoader(config, tiny.tokenizer, PACKS, 0, 1, seed=0)


def go(loader, steps=STEPS):
    """Keys with their source's name, pack numbers, and the state after `steps`."""
    keys, numbers = [], []
    for _, step in zip(range(steps), loader, strict=False):
        for batch in step:
            numbers.append(batch.number)
            keys += [
                (loader.dataset_names[dataset], key) for dataset, key in zip(batch.datasets, batch.keys, strict=True)
            ]
    loader.close()
    return keys, numbers, json.loads(json.dumps(loader.state_dict()))


def resume(loader, state):
    return loader.load_state_dict(state, accept_changes=True)


def waiting(state, source, letter=""):
    """Keys of the pool's samples of source number `source`; a tiny shard holds 8 samples, numbered on."""
    items = [item[-8:] for item in unfold(state["plan"]["pool"]["items"])]
    return [f"{letter}{8 * shard + row:02d}" for number, shard, row, *_ in items if number == source]


def test_without_the_flag_changed_data_is_an_error_that_names_it(tiny, folder):
    _, _, state = go(make(tiny, folder))
    with pytest.raises(
        ValueError,
        match=r"source texts: was .*\[1\.0.* is .*\[3\.0.*data_change=accept .*accept_changes=True",
    ):
        make(tiny, folder, pictures=2.0, texts=3.0).load_state_dict(state)
    (folder / "pictures-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"source pictures: was \[3, .*is \[2, .*set data_change=accept"):
        make(tiny, folder).load_state_dict(state)


def test_the_flag_does_not_allow_other_budgets_or_seeds(tiny, folder):
    _, _, state = go(make(tiny, folder))
    state["identity"]["seed"] = 5
    with pytest.raises(ValueError, match=r"seed: was 5, is 0\. Restore them, or start anew"):
        resume(make(tiny, folder), state)


def test_the_flag_changes_nothing_where_nothing_changed(tiny, folder):
    _, _, state = go(make(tiny, folder))
    plain, flagged = make(tiny, folder), make(tiny, folder)
    plain.load_state_dict(state)
    assert resume(flagged, state) == []
    assert go(plain) == go(flagged)


@pytest.mark.parametrize("packing", ["pool", "task"])
def test_other_weights_keep_every_place_and_lose_no_sample(tiny, folder, packing):
    before, _, state = go(make(tiny, folder, packing))
    loader = make(tiny, folder, packing, pictures=1.0, texts=3.0)
    notes = resume(loader, state)
    assert notes == [
        "shares changed ([weight, epochs, schedule]: pictures [2.0, None, ()] → [1.0, None, ()]; "
        "texts [1.0, None, ()] → [3.0, None, ()])",
        "the mixture counts its shares anew from here",
    ]
    after, numbers, end = go(loader, 30)
    assert numbers[0] == STEPS * PACKS
    # drawn in epochs: counting what still waits, no sample came twice more often than another
    for number, (name, size) in enumerate((("pictures", 20), ("texts", 15))):
        counts = Counter([key for source, key in before + after if source == name] + waiting(end, number, name[0]))
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1
    share = Counter(source for source, _ in after)
    assert share["texts"] / share["pictures"] == pytest.approx(3.0, rel=0.1)


def test_a_new_source_begins_and_the_others_go_on(tiny, folder):
    before, _, state = go(make(tiny, folder, pictures=1.0))
    loader = make(tiny, folder, texts=1.0, pictures=1.0)  # new, and first in the order
    assert resume(loader, state) == [
        "source texts is new: it begins its first epoch",
        "the mixture counts its shares anew from here",
    ]
    after, _, end = go(loader, 12)
    assert {source for source, _ in after} == {"pictures", "texts"}
    drawn = [key for source, key in before + after if source == "pictures"]
    pictures = Counter(drawn + waiting(end, 1, "p"))
    assert len(pictures) == 20
    assert max(pictures.values()) - min(pictures.values()) <= 1


def test_a_removed_source_goes_with_its_waiting_samples(tiny, folder):
    _, _, state = go(make(tiny, folder))
    lost = len(waiting(state, 0))
    loader = make(tiny, folder, texts=1.0)
    notes = resume(loader, state)
    assert notes[0] == f"source pictures is gone, with {lost} samples that waited for a pack"
    assert lost > 0
    after, numbers, _ = go(loader)
    assert {source for source, _ in after} == {"texts"}
    assert numbers == list(range(STEPS * PACKS, 2 * STEPS * PACKS))


def test_a_source_with_another_shard_begins_an_epoch(tiny, folder):
    _, _, state = go(make(tiny, folder))
    epoch = state["plan"]["cursors"][0]["place"][0]
    back = len(waiting(state, 0))
    (folder / "pictures-00002.tar").unlink()  # 4 of its 20 samples
    loader = make(tiny, folder)
    notes = resume(loader, state)
    assert notes[0] == (
        f"source pictures: its shards changed (3 before, 2 now): it begins epoch {epoch + 1} at once, which holds all "
        f"its samples, those that epoch {epoch} gave already and {back} that waited for a pack"
    )
    plan = loader.state_dict()["plan"]
    assert plan["cursors"][0] == {"place": [epoch + 1, 0, 0], "next": None}
    assert plan["cursors"][1] == state["plan"]["cursors"][1]
    after, _, _ = go(loader, 8)
    pictures = [key for source, key in after if source == "pictures"]
    # no sample of the shard that went, and those of the others once before any comes again (but for the pool's delay)
    assert set(pictures) == {f"p{number:02d}" for number in range(16)}


def test_a_change_under_way_can_itself_be_resumed(tiny, folder):
    _, _, state = go(make(tiny, folder))
    loader = make(tiny, folder, pictures=1.0, texts=3.0)
    resume(loader, state)
    _, _, middle = go(loader, 2)
    expected = go(loader, 3)
    again = make(tiny, folder, pictures=1.0, texts=3.0)
    again.load_state_dict(middle)  # no flag: these are its settings now
    assert go(again, 3) == expected


def test_a_schedule_that_changed_goes_on_in_its_phase(tiny, folder):
    _, _, state = go(make(tiny, folder))
    tokens = state["plan"]["tokens"]
    config = make(tiny, folder)._config
    texts = replace(config.sources["texts"], schedule=((tokens // 2, 0.0), (tokens * 3, 5.0)))
    config = replace(config, sources={**config.sources, "texts": texts})
    loader = PackLoader(config, tiny.tokenizer, PACKS, 0, 1, seed=0)
    resume(loader, state)
    assert loader.state_dict()["plan"]["phase"] == 1
    after, _, _ = go(loader)
    rest = [source for source, _ in after[12:]]  # past what waited in the pool
    assert set(rest) == {"pictures"}


@pytest.mark.parametrize("packing", ["pool", "task"])
def test_sources_in_another_order_keep_their_places_by_name(tiny, folder, packing):
    """The state counts sources by number: taken as it stands, one would go on at the other's place."""
    before, _, state = go(make(tiny, folder, packing))
    turned = {"texts": 1.0, "pictures": 2.0}
    with pytest.raises(ValueError, match=r"order of the sources: was \['pictures', 'texts'\], is .*data_change=accept"):
        make(tiny, folder, packing, **turned).load_state_dict(state)
    loader = make(tiny, folder, packing, **turned)
    assert resume(loader, state) == [
        "the sources stand in another order",
        "the mixture counts its shares anew from here",
    ]
    after, _, end = go(loader, 30)
    for number, (name, size) in enumerate((("texts", 15), ("pictures", 20))):
        counts = Counter([key for source, key in before + after if source == name] + waiting(end, number, name[0]))
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1
