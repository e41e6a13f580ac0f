"""What a server's answer means, for every kind of answer; and where the key comes from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.config import ModelConfig, SamplingConfig
from psycho.errors import BadInput
from psycho.inference.endpoint import Failed, api_key, most_tokens, read
from psycho.inference.worker import Completion


def entry(**remote: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": "far", "model": "large", "remote": {"url": "https://far/v1", **remote}})


def body(message: Any, finish: Any = "stop", usage: Any = None) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": 2} if usage is None else usage
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (body({"content": "Yes."}), Completion("Yes.", "stop", 3, 2)),
        (body({"content": None}, "length"), Completion("", "length", 3, 2)),
        (body({"content": "Yes.", "reasoning_content": "Hm."}), Completion("Yes.", "stop", 3, 2, reasoning="Hm.")),
        (body({"content": "Yes.", "reasoning": "Hm."}), Completion("Yes.", "stop", 3, 2, reasoning="Hm.")),
        (body({"content": [{"type": "text", "text": "Y"}, {"type": "image"}, {"type": "text", "text": "es."}]}, None),
         Completion("Yes.", "", 3, 2)),
    ],
)  # fmt: skip
def test_an_answer(answer, expected):
    assert read(entry(), 200, {}, answer) == expected


@pytest.mark.parametrize(
    "garbage",
    [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff\xfe", b"null", b"7",
     body({"content": "Yes."}, usage={}), body({"content": "Yes."}, usage={"prompt_tokens": -1}),
     body({"content": "Yes."}, usage={"prompt_tokens": "3", "completion_tokens": 1}), body({"content": 7}),
     body({"content": ["Yes."]}), body("Yes.")],
)  # fmt: skip
def test_what_is_no_answer_may_be_tried_again_and_may_cost(garbage):
    assert read(entry(), 200, {}, garbage) == Failed("a body that is no chat completion", billed=True)


@given(st.integers(100, 599), st.binary(max_size=40))
def test_no_body_ever_surprises_us_and_none_is_quoted(status, text):
    marked = text + b"secret speech"
    try:
        result = read(entry(), status, {}, marked)
    except BadInput as error:
        result = error
    assert "secret speech" not in repr(result)


def test_statuses():
    assert read(entry(), 429, {"retry-after": "7"}, b"") == Failed("HTTP 429", retry_after="7")
    assert read(entry(), 500, {}, b"") == Failed("HTTP 500") == Failed("HTTP 500", billed=False)
    assert read(entry(), 422, {}, b"") == Completion(error="the endpoint refuses the request (HTTP 422)")
    filtered = json.dumps({"error": {"code": "content_filter"}}).encode()
    assert read(entry(), 400, {}, filtered) == Completion(finish_reason="content_filter")
    with pytest.raises(BadInput, match=r"generation.pool \(far\): https://far/v1 refuses the key"):
        read(entry(), 403, {}, b"")


def test_a_key_of_a_file(tmp_path):
    file = tmp_path / "key"
    with pytest.raises(BadInput, match=f"{file} cannot be read"):
        api_key(entry(api_key_file=str(file)))
    file.write_text("s3cret\n")
    assert api_key(entry(api_key_file=str(file))) == "s3cret"
    assert api_key(entry()) is None and api_key(ModelConfig(name="near", model="m")) is None


def test_no_tokenizer_makes_more_of_a_text_than_it_has_bytes(nano_tokenizer):
    text = "Grüße, 我明白 🙂 " * 20
    prompt, output = most_tokens([{"role": "user", "content": text}], SamplingConfig(max_tokens=9))
    assert output == 9 and len(nano_tokenizer(text).input_ids) <= len(text.encode()) <= prompt


def test_a_remote_entry_has_no_engine_of_its_own():
    with pytest.raises(ValueError, match="model far is remote"):
        entry().model_validate(entry().model_dump() | {"gpus_per_worker": 1})
