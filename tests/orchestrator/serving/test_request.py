import pytest
from pydantic import ValidationError

from orchestrator.serving.config import Limits
from orchestrator.serving.errors import ServingError
from orchestrator.serving.request import ImageRequest, ModelFacts, check_request

CLASSES = {
    "name": "classes",
    "created": 0,
    "width": 8,
    "height": 4,
    "class_names": ("boot", "shirt"),
    "num_classes": 2,
    "has_text": False,
    "experts": 2,
    "steps": 4,
    "guidance_scale": 3.0,
    "selection": "sticky",
    "selections": ("sticky", "top_k"),
    "is_few_step": False,
    "has_guidance": True,
}
TEXT = CLASSES | {"name": "text", "class_names": (), "num_classes": 0, "has_text": True}
STUDENT = TEXT | {"is_few_step": True, "has_guidance": False}
NO_GUIDANCE = TEXT | {"guidance_scale": 1.0}


def check(facts, **fields):
    return check_request(ImageRequest(**fields), ModelFacts(**facts), Limits(images=4, steps=10, prompt_characters=9))


@pytest.mark.parametrize(
    ("facts", "fields", "param"),
    [
        (CLASSES, {"prompt": "a boot"}, "prompt"),
        (CLASSES, {"class_label": "hat"}, "class_label"),
        (CLASSES, {"class_label": 2}, "class_label"),
        (CLASSES, {"class_label": -1}, "class_label"),
        (CLASSES, {"class_label": "²"}, "class_label"),
        (CLASSES, {"class_label": "boot", "negative_prompt": "hat"}, "negative_prompt"),
        (TEXT, {"class_label": "boot"}, "class_label"),
        (TEXT, {"prompt": "0123456789"}, "prompt"),
        (TEXT, {"prompt": "a", "n": 5}, "n"),
        (TEXT, {"prompt": "a", "n": 2, "seeds": [1]}, "seeds"),
        (TEXT, {"prompt": "a", "size": "4x8"}, "size"),
        (TEXT, {"prompt": "a", "steps": 11}, "steps"),
        (TEXT, {"prompt": "a", "selection": "auto"}, "selection"),
        (TEXT, {"prompt": "a", "partial_images": 2}, "partial_images"),
        (TEXT, {"prompt": "a", "adapter": "x"}, "adapter"),
        (TEXT, {"prompt": "a", "compression": "int8"}, "compression"),
        (TEXT, {"negative_prompt": "b"}, "negative_prompt"),
        (NO_GUIDANCE, {"prompt": "a", "negative_prompt": "b"}, "negative_prompt"),
        (STUDENT, {"prompt": "a", "steps": 2}, "steps"),
        (STUDENT, {"prompt": "a", "guidance_scale": 2}, "guidance_scale"),
        (STUDENT, {"prompt": "a", "negative_prompt": "b"}, "negative_prompt"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_the_field(facts, fields, param):
    with pytest.raises(ServingError) as caught:
        check(facts, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.to_json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [{"n": 0}, {"n": True}, {"n": "2"}, {"seeds": [-1]}, {"seeds": [2**63]}, {"seeds": []}, {"steps": 0}]
    + [{"guidance_scale": value} for value in (-1, float("nan"), float("inf"))]
    + [{"response_format": "file"}, {"output_format": "gif"}, {"typo": 1}],
)
def test_a_field_of_a_wrong_type_or_range_is_invalid(fields):
    with pytest.raises(ValidationError):
        ImageRequest(prompt="a", **fields)


def test_all_fields_of_openai_are_accepted():
    request = {
        "prompt": "a", "model": "text", "n": None, "size": "8x4", "quality": "hd", "style": "vivid", "user": "u",
        "background": "auto", "moderation": "low", "response_format": "url", "output_compression": 90,
    }  # fmt: skip
    generation = check(TEXT, **request, output_format="jpeg", stream=True, partial_images=2)
    assert (len(generation.seeds), generation.previews, generation.quality) == (1, 2, 90)


def test_a_class_may_be_a_name_or_a_number():
    labels = [check(CLASSES, class_label=label).class_label for label in ("boot", 1, "1")]
    assert labels == ["boot", "1", "1"]


def test_seeds_that_are_not_given_differ():
    assert len(set(check(TEXT, prompt="a", n=4).seeds)) == 4
