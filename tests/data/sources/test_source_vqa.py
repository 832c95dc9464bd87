"""Questions about pictures in the forms of the public sets."""

import pytest

from data_pipelines.samples import Text
from data_pipelines.sources.vqa import best_answer, read_vqa


def turns(record):
    return [message.parts[-1].text for message in record.messages]


def test_vqav2_joins_questions_and_answers_of_a_picture(tmp_path, make_picture, write_json, load):
    make_picture("val/COCO_val2014_000000000042.jpg")
    questions = write_json(
        "q.json",
        {
            "questions": [
                {"question_id": 1, "image_id": 42, "question": "What?"},
                {"question_id": 2, "image_id": 42, "question": "How many?"},
                {"question_id": 3, "image_id": 43, "question": "Gone?"},
                {"question_id": 4, "image_id": 42, "question": "Unanswered?"},
            ]
        },
    )
    answers = write_json(
        "a.json",
        {
            "annotations": [
                {
                    "question_id": 1,
                    "multiple_choice_answer": "net",  # counts before any confidence
                    "answers": [{"answer": "bat", "answer_confidence": "yes"}]
                    + [{"answer": "net", "answer_confidence": "no"}] * 2,
                },
                {
                    "question_id": 2,
                    "answers": [{"answer": "3", "answer_confidence": "maybe"}] * 3
                    + [{"answer": "2", "answer_confidence": "yes"}] * 2,
                },
                {"question_id": 3, "multiple_choice_answer": "x"},
            ]
        },
    )
    imported = load(read_vqa(questions, answers, tmp_path / "val", "COCO_val2014_{:012d}.jpg"))
    assert turns(imported.only()) == ["What? Answer:", "net", "How many? Answer:", "2"]
    assert imported.only().task == "vqa"
    assert [reason for _, reason in imported.reasons()] == ["bad_field", "missing_media"]


def test_the_answer_with_the_most_confidence_is_learnt():
    votes = [{"answer": "a", "answer_confidence": c} for c in ("maybe", "maybe")]
    assert best_answer("k", [*votes, {"answer": "b", "answer_confidence": "yes"}]) == "a"  # 1.0 each: the first
    assert best_answer("k", [*votes, {"answer": "b"}, {"answer": "b", "answer_confidence": "no"}]) == "b"
    assert best_answer("k", ["x", "y", "y"]) == "y"


def test_aokvqa_gives_choices_or_the_bare_answer(tmp_path, make_picture, write_json, load):
    make_picture("7.jpg")
    path = write_json(
        "q.json",
        [
            {
                "image_id": 7,
                "question": "Colour?",
                "choices": ["red", "blue"],
                "correct_choice_idx": 1,
                "direct_answers": ["navy"],
            }
        ],
    )
    assert turns(load(read_vqa(path, None, tmp_path, "{}.jpg")).only()) == ["Colour? Answer:", "blue"]
    asked = turns(load(read_vqa(path, None, tmp_path, "{}.jpg", choices=True)).only())
    assert asked == ["Colour? Choose from: red; blue. Answer:", "blue"]


def test_gqa_and_docvqa(tmp_path, make_picture, write_json, load):
    make_picture("n1.jpg")
    make_picture("docs/page.png", form="PNG")
    gqa = write_json("gqa.json", {"0123": {"imageId": "n1", "question": "Where?", "answer": "left"}})
    assert turns(load(read_vqa(gqa, None, tmp_path, "{}.jpg")).only()) == ["Where? Answer:", "left"]
    doc = write_json(
        "d.json", {"data": [{"questionId": 5, "question": "Sum?", "answers": ["5", "5.0"], "image": "docs/page.png"}]}
    )
    assert turns(load(read_vqa(doc, None, tmp_path, "{}")).only()) == ["Sum? Answer:", "5"]


@pytest.mark.parametrize("name", ["{", "{:d}.jpg", "{a}"])
def test_a_file_name_form_that_does_not_fit_is_reported(tmp_path, write_json, load, name):
    path = write_json("q.json", [{"image_id": "x", "question": "?", "answer": "y"}])
    assert load(read_vqa(path, None, tmp_path, name)).reasons() == [("q:0", "bad_field")]


def test_text_of_messages_is_text(tmp_path, make_picture, write_json, load):
    make_picture("1.jpg")
    path = write_json("q.json", [{"image_id": 1, "question": "<image>?", "answer": "y"}])
    assert load(read_vqa(path, None, tmp_path, "{}.jpg")).only().messages[0].parts[1] == Text("<image>? Answer:")
