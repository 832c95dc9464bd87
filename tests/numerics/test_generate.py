"""Generation against transformers' greedy search on the exported model, and its own rules."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from data_pipelines.pack.collate import collate
from qwen2vl_train.generate import Sampling, generate, inference_dtype, open_model
from qwen2vl_train.model.attention import resolve_backend
from qwen2vl_train.model.qwen2vl import LogitsRequest
from qwen2vl_train.model.weights import model_tensors, save_hf
from tests.model.builders import SPECIAL, document, pack, reference_inputs, tiny_model

PROMPTS = [
    [5, ("image", (1, 4, 6)), 3, ("video", (2, 4, 4)), 7],
    [20],
    [2, ("image", (1, 2, 2)), ("image", (1, 6, 4)), 4],
    [1],
    [3, ("video", (1, 8, 2)), 2],
]
STOPS = (3, 7, 50, 90)


@pytest.fixture(scope="module")
def model():
    # wide weights make a random model's favourite word depend on its context
    model = tiny_model(std=0.3)
    with torch.no_grad():  # pads are never words of an answer
        model.model.embed_tokens.weight[[SPECIAL.image_pad, SPECIAL.video_pad]] = 0.0
    return model


@pytest.fixture(scope="module")
def prompts():
    return [document(parts, seed=n) for n, parts in enumerate(PROMPTS)]


def test_on_cuda_models_answer_with_flash_attention_in_half_the_memory():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (inference_dtype(cpu), inference_dtype(cuda)) == (torch.float32, torch.bfloat16)
    assert resolve_backend("auto", cuda, inference_dtype(cuda)) == "varlen"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_opened_model_is_the_saved_one_in_the_wanted_precision(model, prompts, tmp_path, dtype):
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32)
    opened = open_model(tmp_path, torch.device("cpu"), dtype)
    assert not opened.training
    stored = dict(model.named_parameters())
    for name, parameter in opened.named_parameters():
        assert parameter.dtype == (dtype or torch.float32)
        assert torch.equal(parameter, stored[name].to(parameter.dtype))
    if dtype is None:
        assert generate(opened, prompts, 8, STOPS) == generate(model, prompts, 8, STOPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_opened_on_cuda_answers_there(model, prompts, tmp_path):
    save_hf(model_tensors(model), tmp_path, model.config)
    opened = open_model(tmp_path, torch.device("cuda"))
    assert {(value.device.type, value.dtype) for value in opened.parameters()} == {("cuda", torch.bfloat16)}
    assert all(generate(opened, prompts, 8, STOPS))


def test_greedy_generation_equals_transformers_on_the_exported_model(model, prompts, tmp_path):
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32)
    reference = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    answers = generate(model, prompts, 24, STOPS)
    assert len({tuple(answer) for answer in answers}) == len(answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        batch = pack([prompt])
        found = reference.generate(
            **reference_inputs(batch, positions=False),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        assert answer == found[0, batch.num_tokens :].tolist()


@pytest.mark.parametrize("positions", ["mrope", "1d"])
def test_cached_steps_equal_reading_the_whole_sequence_again(model, positions):
    model = copy.deepcopy(model)
    model.config = replace(model.config, positions=positions)
    # a clip longer than it is wide: its text goes on after its last step, in the prompt and in what is generated
    prompt = document([2, ("video", (6, 2, 4)), 3], seed=4)
    answer = generate(model, [prompt], 8, ())[0]
    whole = document([1])
    whole.input_ids = torch.cat((prompt.input_ids, torch.tensor(answer)))
    whole.labels = torch.full_like(whole.input_ids, -100)
    whole.media, whole.patches = prompt.media, prompt.patches
    batch = collate(0, [whole], SPECIAL, 1 << 20, one_dimensional=positions == "1d")
    logits = model(LogitsRequest(batch, torch.arange(batch.num_tokens)))
    assert logits.argmax(-1)[len(prompt.input_ids) - 1 : -1].tolist() == answer


def test_an_answer_does_not_depend_on_the_batch_or_how_prompts_are_read(model, prompts):
    together = generate(model, prompts, 24, STOPS)
    assert [generate(model, [prompt], 24, STOPS)[0] for prompt in prompts] == together
    assert generate(model, prompts, 24, STOPS, prefill_tokens=30) == together
    assert generate(model, prompts[::-1], 24, STOPS) == together[::-1]


def test_generation_ends_at_a_stop_token_or_the_limit(model, prompts):
    free = generate(model, prompts, 12, ())
    assert all(len(answer) == 12 for answer in free)
    stop = free[1][4]
    answer = generate(model, prompts, 12, {stop})[1]
    assert answer == free[1][: free[1].index(stop) + 1]


def test_sampling_repeats_with_its_seed_and_keeps_to_the_likeliest_words(model, prompts):
    first = generate(model, prompts, 12, (), Sampling(1.0, seed=1))
    assert generate(model, prompts, 12, (), Sampling(1.0, seed=1)) == first
    assert generate(model, prompts, 12, (), Sampling(1.0, seed=2)) != first
    greedy = generate(model, prompts, 12, ())
    assert generate(model, prompts, 12, (), Sampling(1.0, top_k=1)) == greedy
    assert generate(model, prompts, 12, (), Sampling(1.0, top_p=1e-6)) == greedy


def test_bad_requests_are_refused(model, prompts):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, prompts, 0, ())
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1.0)
    assert generate(model, [], 4, ()) == []
