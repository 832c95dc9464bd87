"""Chats of every read form, hand-written, and the messages they become."""

import json

import pytest

from data_pipelines.encode.chat import tokenize_record
from data_pipelines.errors import DataError
from data_pipelines.samples import MediaRef, Message, Region, Text
from data_pipelines.sources.chat import chat_item, read_chats


@pytest.fixture
def chats(tmp_path, make_picture, write_json, load):
    make_picture("media/a.jpg")
    make_picture("media/b.jpg", seed=1)

    def run(*objects):
        return load(read_chats(write_json("chats.json", list(objects)), tmp_path / "media", "c"))

    return run


def image(number):
    return MediaRef(f"{number}.jpg", kind="image")


def test_llava_conversations_place_pictures_at_their_tags(chats):
    record = chats(
        {
            "id": 1,
            "image": "a.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}],
        }
    ).only()
    assert (record.key, record.task) == ("c/000000", "chat")
    assert record.messages == (Message("user", (image(0), Text("What?"))), Message("assistant", (Text("A box."),)))


def test_sharegpt_messages_keep_system_and_order_of_pictures(chats):
    record = chats(
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "<image> or <image>?"},
                {"role": "assistant", "content": "first"},
                {"role": "user", "content": "and <image>?"},
                {"role": "assistant", "content": "same"},
            ],
            "images": ["b.jpg", "a.jpg", "b.jpg"],
        }
    ).only()
    assert record.messages[:2] == (
        Message("system", (Text("Be short."),)),
        Message("user", (image(0), Text(" or "), image(1), Text("?"))),
    )
    assert record.messages[3].parts == (Text("and "), image(0), Text("?"))
    assert set(record.media) == {"0.jpg", "1.jpg"}


def test_openai_parts_name_their_own_media(chats):
    content = [
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image", "image": "b.jpg", "max_pixels": 784},
        {"type": "text", "value": "?"},
    ]
    record = chats({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}).only()
    assert record.messages[0].parts == (image(0), MediaRef("1.jpg", max_pixels=784, kind="image"), Text("?"))


def test_media_that_parts_name_are_not_shown_again_for_being_listed(chats):
    content = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    assert chats({"messages": turns, "images": ["a.jpg"]}).only().messages[0].parts == (image(0), Text("?"))
    both = chats({"messages": turns, "images": ["a.jpg", "b.jpg"]}).only()
    assert [part.name for part in both.messages[0].parts[:2]] == ["0.jpg", "1.jpg"]


def test_tags_that_only_an_answer_spells_out_are_its_words(chats):
    turns = [("human", "<image>\nHow?"), ("gpt", "Write <image> or <video>.")]
    record = chats({"image": "a.jpg", "conversations": [{"from": f, "value": v} for f, v in turns]}).only()
    assert record.messages == (
        Message("user", (image(0), Text("How?"))),
        Message("assistant", (Text("Write <image> or <video>."),)),
    )


def test_alpaca_joins_instruction_and_input(chats):
    record = chats(
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]], "system": "S"}
    ).only()
    assert [(m.role, m.parts[0].text) for m in record.messages] == [
        ("system", "S"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]


def test_tool_calls_are_one_answer_whose_results_are_not_learnt(chats):
    record = chats(
        {
            "tools": json.dumps([{"name": "find", "description": "Finds.", "parameters": {"q": "str"}}]),
            "images": ["a.jpg"],
            "conversations": [
                {"from": "human", "value": "Look"},
                {"from": "function_call", "value": '{"name": "find", "arguments": {"q": "x"}}'},
                {"from": "observation", "value": "<image>"},
                {"from": "gpt", "value": "Done"},
            ],
        }
    ).only()
    system, _, answer = record.messages
    assert '### find\nfind: Finds. Parameters: {"q": "str"}' in system.parts[0].text
    assert answer.parts == (
        Text('*FUNCTION*: find *ARGS*: {"q": "x"}\n'),
        Text("*RESULT*: ", False),
        image(0),
        Text("\n", False),
        Text("*RETURN*: "),
        Text("Done"),
    )


def call(name, arguments, number):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number, content):
    return {"role": "tool", "tool_call_id": number, "content": content}


def test_openai_tool_calls_are_the_same_answer(chats):
    calls = [call("find", '{"q": "x"}', "c1"), call("now", "", "c2")]
    record = chats(
        {
            "tools": [{"type": "function", "function": {"name": "find"}}, {"function": {"name": "now"}}],
            "messages": [
                {"role": "user", "content": "Look"},
                {"role": "assistant", "content": None, "tool_calls": calls},
                result("c2", "noon"),
                result("c1", "found"),
                {"role": "assistant", "content": "Again.", "tool_calls": [call("find", {"q": "é"}, "c1")]},
                result("c1", [{"type": "text", "text": "no"}]),
                {"role": "assistant", "content": "Done"},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "Bye", "tool_calls": None},
            ],
        }
    ).only()
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "user", "assistant"]
    answer = record.messages[2].parts
    assert "".join(part.text for part in answer) == (
        '*FUNCTION*: find *ARGS*: {"q": "x"}\n*FUNCTION*: now *ARGS*: {}\n*RESULT*: found\n*RESULT*: noon\n'
        'Again.\n*FUNCTION*: find *ARGS*: {"q": "é"}\n*RESULT*: no\n*RETURN*: Done'
    )
    unlearnt = "".join(part.text for part in answer if not part.supervised)
    assert unlearnt == "*RESULT*: found\n*RESULT*: noon\n*RESULT*: no\n"


def test_arguments_written_as_a_string_of_json_are_read_first(chats):
    turns = [("human", "?"), ("function_call", '{"name": "f", "arguments": "{\\"x\\": 1}"}')]
    turns += [("observation", "ok"), ("gpt", "Done")]
    record = chats({"conversations": [{"from": f, "value": v} for f, v in turns]}).only()
    assert record.messages[1].parts[0] == Text('*FUNCTION*: f *ARGS*: {"x": 1}\n')


def test_an_answer_right_before_a_call_says_why_it_calls(chats):
    """ShareGPT has no field for words beside a call; OpenAI's two forms of the same are read alike."""
    turns = [("human", "?"), ("gpt", "I look."), ("function_call", '{"name": "f", "arguments": {}}')]
    turns += [("observation", "ok"), ("gpt", "Done")]
    said = chats({"conversations": [{"from": f, "value": v} for f, v in turns]}).only().messages[1].parts
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call("f", "{}", "c")]},
        result("c", "ok"),
        {"role": "assistant", "content": "Done"},
    ]
    beside = chats({"messages": messages}).only().messages[1].parts
    for parts in (said, beside):
        words = "".join(part.text for part in parts)
        assert words == "I look.\n*FUNCTION*: f *ARGS*: {}\n*RESULT*: ok\n*RETURN*: Done"
        assert "".join(part.text for part in parts if not part.supervised) == "*RESULT*: ok\n"


def test_an_answer_of_no_weight_is_not_learnt_whatever_its_form(chats):
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "weight": 0},
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call("f", "{}", "c")], "weight": 0},
        result("c", "r"),
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "c", "weight": 1},
    ]
    answers = [m for m in chats({"messages": turns}).only().messages if m.role == "assistant"]
    assert [any(part.supervised for part in answer.parts) for answer in answers] == [False, False, True]


def test_box_tags_become_regions_that_are_written_back_alike(chats):
    answer = "See <ref>it</ref><box>(100,250),(500,1000)</box><box>(0,0),(1,1)</box> & <box>1,2</box>"
    record = chats(
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], "images": ["a.jpg"]}
    ).only()
    text, region, rest = record.messages[1].parts
    assert (text, rest) == (Text("See "), Text(" & <box>1,2</box>"))
    # The middle of cell 100 of 40 pixels is 100.5 / 1000 * 40; 1000 is read as the last cell, 999.
    assert region.phrase == "it"
    assert region.boxes[0] == pytest.approx((4.02, 5.01, 20.02, 19.99))
    assert [int(1000 * x / (40, 20)[i % 2]) for i, x in enumerate(region.boxes[1])] == [0, 0, 1, 1]


def test_places_thinner_than_a_cell_keep_an_area_and_their_cells(chats, tokenizer):
    answer = "<box>(999,5),(1000,9)</box><box>(75,62),(75,62)</box>"
    answer += "<quad>(999,5),(1000,5),(1000,9),(999,9)</quad>"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    record = chats({"messages": turns, "images": ["a.jpg"]}).only()
    text = tokenize_record(record, tokenizer, "plain", record.media)
    assert tokenizer.decode(text.input_ids).split("\n")[-1] == (
        "<|box_start|>(999,5),(999,9)<|box_end|><|box_start|>(75,62),(75,62)<|box_end|>"
        "<|quad_start|>(999,5),(999,5),(999,9),(999,9)<|quad_end|><|endoftext|>"
    )


def test_among_several_pictures_a_box_belongs_to_the_latest(chats):
    turns = [
        ("user", "<image> and <image>"),
        ("assistant", "<ref>dog</ref><box>(0,0),(500,500)</box>"),
        ("user", "In the first? <image>"),
        ("assistant", "<box>(0,0),(500,500)</box>"),
    ]
    names = ["a.jpg", "b.jpg", "a.jpg"]
    record = chats({"messages": [{"role": r, "content": c} for r, c in turns], "images": names}).only()
    first, second = record.messages[1].parts[0], record.messages[3].parts[0]
    assert (first.name, first.phrase, second.name) == ("1.jpg", "dog", "0.jpg")


def test_regions_in_parts_are_checked_and_placed(chats):
    part = {"type": "region", "phrase": "dog", "boxes": [[1, 2, 3, 4]], "image": "b.jpg"}
    pictures = [{"type": "image", "image": "a.jpg"}, {"type": "image", "image": "b.jpg"}]
    turns = [{"role": "user", "content": pictures}, {"role": "assistant", "content": [part]}]
    assert chats({"messages": turns}).only().messages[1].parts == (Region("1.jpg", "dog", ((1.0, 2.0, 3.0, 4.0),)),)


def test_answers_before_the_first_question_and_open_questions_are_left_out(chats):
    names = ["gpt", "human", "gpt", "human"]
    record = chats({"conversations": [{"from": name, "value": str(i)} for i, name in enumerate(names)]}).only()
    assert [message.parts[0].text for message in record.messages] == ["1", "2"]


def test_unsupervised_answers_by_loss_weight(chats):
    turns = [("user", "a", 0.0), ("assistant", "b", 0.0), ("user", "c", 0.0), ("assistant", "d", 1.0)]
    record = chats({"messages": [{"role": r, "content": c, "loss_weight": w} for r, c, w in turns]}).only()
    assert [message.parts[0].supervised for message in record.messages] == [True, False, True, True]


def boxed(answer):
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]


TURNS = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
BAD = [
    ({"messages": TURNS, "images": ["a.jpg", "b.jpg"]}, "tag_mismatch"),
    ({"messages": TURNS, "images": ["../../a.jpg"]}, "unsafe_path"),
    ({"messages": TURNS, "images": ["http://127.0.0.1/a.jpg"]}, "unsafe_path"),
    ({"messages": TURNS, "images": [None]}, "no_media"),
    ({"messages": TURNS, "images": ["a.jpg"], "audios": ["x.wav"]}, "unsupported_media"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": [1]}]}]}, "missing_media"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad_field"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "bad_turns"),
    ({"messages": [{"role": "observation", "content": "x"}]}, "bad_turns"),
    ({"messages": [{"role": "assistant", "tool_calls": [call("f", "{}", 1)]}, result(2, "x")]}, "bad_turns"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "bad_field"),
    ({"messages": [{"role": "assistant", "tool_calls": [call(None, "{}", 1)]}]}, "bad_turns"),
    ({"messages": [*TURNS, *boxed("<box>(9,9),(1,1)</box>")], "images": ["a.jpg"]}, "bad_box"),
    ({"messages": [*TURNS, *boxed("<box>(9,9),(11,1001)</box>")], "images": ["a.jpg"]}, "bad_box"),
    ({"messages": boxed("<box>(1,1),(9,9)</box>"), "videos": ["c.mp4"]}, "bad_box"),
    ({"messages": "x"}, "bad_field"),
    ({"conversations": [{"from": "human"}]}, "bad_text"),
    ({"instruction": "x"}, "bad_text"),
    ({"prompt": "x"}, "no_record"),
]


@pytest.mark.parametrize(("data", "reason"), BAD)
def test_broken_chats_are_refused_with_a_reason(tmp_path, make_picture, data, reason):
    make_picture("a.jpg")
    make_picture("b.jpg")
    with pytest.raises(DataError) as caught:
        chat_item("k", data, tmp_path, None)
    assert caught.value.reason == reason


def test_broken_lines_cost_themselves_only(tmp_path, load):
    path = tmp_path / "c.jsonl"
    good = '{"instruction": "line\u2028sep", "output": "y"}'
    path.write_bytes("\n".join([good, "", "not json", "null", good, good[:20]]).encode() + b"\n\xff\n")
    imported = load(read_chats(path, tmp_path, "c"))
    assert list(imported.records) == ["c/000000", "c/000004"]
    assert imported.reasons() == [
        ("c.jsonl:3", "bad_json"),
        ("c/000003", "bad_field"),
        ("c.jsonl:6", "bad_json"),
        ("c.jsonl:7", "bad_json"),
    ]
